"""From a recipe to a quantized model: build it, run it to see its inputs, apply the recipe's methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from sdcomp.model.pipeline import StableDiffusion
from sdcomp.observation import MomentObserver, can_observe, weight_matrix
from sdcomp.quantization.calibration import Calibrator
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.recipes import Recipe, build, recipe_of

MEMORY = 8 * 2**30
"""Bytes of second moments that are gathered in one pass by default."""


def quantize(
    sd: StableDiffusion,
    recipe: str | Recipe,
    prompts: Sequence[str],
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    steps: int = 20,
    sampler: str = "ddim",
    seed: int = 0,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    memory: int = MEMORY,
    progress: bool = False,
    **overrides: object,
) -> QuantModel:
    """Quantize a model's UNet by a recipe, by its name or itself; returns the calibrated `QuantModel`.

    The model generates images of the calibration `prompts` (see `StableDiffusion.generate` for the
    arguments), and the layers' inputs are observed on the way. `overrides` are arguments of the model class,
    see `build`; `memory` is that of `apply_recipe`. The same arguments give the same model.
    """
    model = build(recipe, sd.unet, weight_bits, act_bits, **overrides)
    quantized = sd.replace(unet=model)

    def run() -> None:
        quantized.generate(
            prompts, steps=steps, sampler=sampler, seed=seed, guidance_scale=guidance_scale,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip

    return apply_recipe(model, recipe, run, memory=memory, progress=progress)


def apply_recipe(
    model: QuantModel,
    recipe: str | Recipe,
    run: Callable[[], object],
    *,
    memory: int = MEMORY,
    progress: bool = False,
) -> QuantModel:
    """Calibrate a model that `build` made, and apply the recipe's methods; returns the model.

    `run` is any callable that calls the model, with quantization switched off for the time. It is called
    once, and once more for each further `memory` bytes that the second moments of all layers take: a layer
    with n columns takes 4 n^2. Layers without second moments (see `can_observe`) keep weights rounded to
    nearest.

    Raises what `Calibrator.observe` and `MomentObserver` raise.
    """
    recipe = recipe_of(recipe)
    calibrator = Calibrator(None, model, **recipe.calibrator)
    layers = model.quantized_layers() if recipe.methods else []
    layers = [layer for layer in layers if layer.weight_quantizer is not None and can_observe(layer)]
    groups = list(_groups(layers, memory)) or [[]]
    with tqdm(total=len(layers), desc="round", disable=not progress) as bar:
        for i, group in enumerate(groups):
            with MomentObserver(model, ["module." + layer.name for layer in group], **_rows(recipe)) as seen:
                if i == 0 and any(layer.spec.calibrated for layer in model.quantized_layers()):
                    calibrator.observe(run)
                elif group:
                    with _switched_off(model):
                        run()
            moments = seen.result()
            for layer in group:
                for method in recipe.methods:
                    method(layer, moments["module." + layer.name])
                bar.update()
    model.calibration["methods"] = [repr(method) for method in recipe.methods]
    return model


def _groups(layers: Sequence[QuantLayer], memory: int) -> Iterator[list[QuantLayer]]:
    """Layers in order, as many at a time as have their second moments in `memory` bytes, at least one."""
    sizes = [4 * weight_matrix(layer).shape[1] ** 2 for layer in layers]
    totals = itertools.accumulate(sizes)
    for _, group in itertools.groupby(zip(totals, layers, strict=True), lambda pair: (pair[0] - 1) // memory):
        yield [layer for _, layer in group]


def _rows(recipe: Recipe) -> dict[str, int]:
    return {"rows": max((method.rows for method in recipe.methods), default=1)}


@contextmanager
def _switched_off(model: QuantModel) -> Iterator[None]:
    """Let the full-precision model run."""
    state = model.state
    before = state.weights, state.activations
    state.weights = state.activations = False
    try:
        yield
    finally:
        state.weights, state.activations = before
