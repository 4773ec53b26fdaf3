"""From a recipe to a quantized model: build it, run it to see its inputs, apply the recipe's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from sdcomp.model import weights_digest
from sdcomp.model.kinds import require_model
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.model.rebuild import normal_tensors
from sdcomp.model.samplers import SAMPLER, STEPS
from sdcomp.moments import MEMORY, MomentObserver, can_observe, within_memory
from sdcomp.quantization.calibration import Calibrator, calibration_prompts
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.recipes import Recipe, build, recipe_of
from sdcomp.quantization.resume import RoundingCheckpoint


def quantize(
    sd: StableDiffusion,
    recipe: str | Recipe,
    prompts: str | Iterable[str],
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    steps: int = STEPS,
    sampler: str = SAMPLER,
    seed: int = 0,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    memory: float = MEMORY,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    **overrides: object,
) -> QuantModel:
    """Quantize a model's UNet by `recipe`, a `Recipe` or the name of a preset; returns the `QuantModel`.

    The model generates images of the calibration `prompts` (see `StableDiffusion.generate` for the
    arguments and their defaults), and the layers' inputs are observed on the way. `overrides` are arguments
    of the model class, see `build`; `memory` and `checkpoint` are those of `apply_recipe`. The same arguments
    give the same model. Raises TypeError for a UNet alone, and what `calibration_prompts`, `build`,
    `generate` and `apply_recipe` raise.
    """
    require_model(sd)
    prompts = calibration_prompts(prompts)
    model = build(recipe, sd.unet, weight_bits, act_bits, **overrides)
    quantized = sd.replace(unet=model)
    generation = {
        "steps": steps, "sampler": sampler, "seed": seed, "guidance_scale": guidance_scale,
        "batch_size": batch_size,
    }  # fmt: skip

    def run() -> None:
        quantized.generate(prompts, pad=False, progress=progress, **generation)

    inputs = f"{prompts} {generation}"
    apply_recipe(model, recipe, run, memory=memory, checkpoint=checkpoint, inputs=inputs, progress=progress)
    model.calibration |= {"prompts": len(prompts), **generation}
    return model


@normal_tensors()
def apply_recipe(
    model: QuantModel,
    recipe: str | Recipe,
    run: Callable[[], object],
    *,
    memory: float = MEMORY,
    checkpoint: str | Path | None = None,
    inputs: str = "",
    progress: bool = False,
) -> QuantModel:
    """Calibrate a model that `build` made, and apply the recipe's methods; returns the model.

    `run` is any callable that calls the model. Quantization is switched off while it runs. It is called once,
    and again for each further `memory` bytes of second moments; those of a layer with n columns take 4 n^2
    bytes. A calibration with `quantized_inputs` takes calls of its own, see `Calibrator.observe`. The result
    does not depend on `memory`. Layers without second moments (see `can_observe`) keep weights rounded to
    nearest.

    A killed call goes on from the file `checkpoint`, with the same result; `inputs` says what `run` computes,
    so that the checkpoint of another calibration is refused.

    Raises what `Calibrator.observe` and `MomentObserver` raise, and UserError for a wrong checkpoint.
    """
    recipe = recipe_of(recipe)
    layers = model.quantized_layers() if recipe.methods else []
    layers = [layer for layer in layers if layer.weight_quantizer is not None and can_observe(layer)]
    inputs = f"{recipe} {model.arguments()} {weights_digest(model.module)} {inputs}"
    kept = RoundingCheckpoint(checkpoint, inputs)
    done = kept.resume(model)
    layers = [layer for layer in layers if layer.name not in done]
    groups = list(within_memory(layers, memory))
    to_calibrate = not done and any(layer.spec.calibrated for layer in model.quantized_layers())
    calibrator = Calibrator(None, model, **recipe.calibrator)
    if to_calibrate and (calibrator.quantized_inputs or not groups):
        calibrator.observe(run)
        to_calibrate = False
    with tqdm(total=len(layers), desc="round", disable=not progress) as bar:
        for i, group in enumerate(groups):
            names = [f"module.{layer.name}".rstrip(".") for layer in group]
            with MomentObserver(model, names, rows=_rows(recipe)) as seen:
                if i == 0 and to_calibrate:
                    calibrator.observe(run)  # which leaves inputs and weights in full precision
                else:
                    with _switched_off(model):
                        run()
            for layer, moments in zip(group, seen.result().values(), strict=True):
                for method in recipe.methods:
                    method(layer, moments)
                done.add(layer.name)
                kept.keep(model, done)
                bar.update()
            kept.keep(model, done, now=i + 1 < len(groups))
    model.calibration["methods"] = [repr(method) for method in recipe.methods]
    kept.remove()
    return model


def _rows(recipe: Recipe) -> int:
    return max((method.rows for method in recipe.methods), default=1)


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
