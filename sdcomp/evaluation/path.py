"""The errors of a compressed UNet along the sampling path, and of its single layers.

The squared error of a single noise prediction does not tell whether errors cancel or add up on the way to an
image. So there are other measures beside `noise_mse`: the signed error along the prediction, the error of the
final latents along the compressed UNet's own path, and the error of each layer by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdcomp.evaluation.noise import noise_mse, predictions
from sdcomp.model import StableDiffusion, Trace
from sdcomp.model.samplers import make_sampler
from sdcomp.quantization import QuantLayer, QuantModel


@dataclass(frozen=True)
class PathErrors:
    """Errors of a UNet to the full one, for S steps and N images.

    `step` `(S, N)`: mean squared error of the noise predictions along the full UNet's path. `gain` `(S, N)`:
    the signed error along the prediction, <found, wanted> / <wanted, wanted> - 1; below 0 the noise is
    under-predicted. `final` `(N,)`: squared error of the final latents along the UNet's own path from the
    same noise, relative to the square of the full UNet's latents.
    """

    step: Tensor
    gain: Tensor
    final: Tensor


def path_errors(
    sd: StableDiffusion,
    unet: nn.Module,
    prompts: list[str],
    trace: Trace,
    *,
    steps: int,
    sampler: str = "ddim",
    seed: int = 0,
    **settings: object,
) -> PathErrors:
    """Measure a UNet along the full UNet's path and along its own.

    `trace` is of `sd.generate(prompts, ...)` with the same arguments. `settings` are `guidance_scale`,
    `negative_prompt`, `batch_size` and `progress`. Raises what `predictions` and `generate` raise.
    """
    step, gain = torch.empty(trace.latents.shape[:2]), torch.empty(trace.latents.shape[:2])
    for i, rows, found, wanted in predictions(sd, unet, prompts, trace, **settings):
        step[i, rows] = (found - wanted).square().mean((1, 2, 3))
        gain[i, rows] = (found * wanted).sum((1, 2, 3)) / wanted.square().sum((1, 2, 3)) - 1
    own = sd.replace(unet=unet).generate(
        prompts, steps=steps, sampler=sampler, seed=seed, trace=True, **settings
    )[1]
    # The last step of every sampler depends on its latents and prediction alone.
    last = make_sampler(sampler, sd.schedule, steps)
    ends = [last.step(steps - 1, t.latents[-1], t.noise_predictions[-1], None) for t in (own, trace)]
    final = (ends[0] - ends[1]).square().sum((1, 2, 3)) / ends[1].square().sum((1, 2, 3))
    return PathErrors(step, gain, final)


def thinned(trace: Trace, images: int, every: int = 1) -> Trace:
    """Return a trace of its first `images` only, and of each `every`-th step."""
    latents, predicted = (t[::every, :images] for t in (trace.latents, trace.noise_predictions))
    return Trace(trace.timesteps[::every], latents, predicted)


def layer_errors(
    sd: StableDiffusion,
    model: QuantModel,
    prompts: list[str],
    trace: Trace,
    layers: Sequence[str] = (),
    **settings: object,
) -> dict[str, float]:
    """Return the mean of `noise_mse` with one layer quantized at a time, by the layer's name.

    `layers` are all quantized layers by default. The other arguments and errors are those of `predictions`.
    """
    errors = {}
    for name in layers or [layer.name for layer in model.quantized_layers()]:
        with model.only(name):
            errors[name] = noise_mse(sd, model, prompts, trace, **settings).mean().item()
    return errors


def output_errors(
    sd: StableDiffusion, model: QuantModel, prompts: list[str], trace: Trace, **settings: object
) -> dict[str, float]:
    """Return the squared error of each layer's output, relative to the output's square, by its name.

    Each layer sees the input that it has in the full-precision model, so a calibration of single layers can
    measure this error. The arguments and errors are those of `predictions`.
    """
    state = model.state
    switches = state.weights, state.activations
    errors: dict[str, list[float]] = {layer.name: [0.0, 0.0] for layer in model.quantized_layers()}

    def see(layer: QuantLayer, args: tuple[Tensor, ...], wanted: Tensor) -> None:
        state.weights, state.activations = switches
        found = layer.forward(*args)
        state.weights = state.activations = False
        errors[layer.name][0] += (found - wanted).square().sum().item()
        errors[layer.name][1] += wanted.square().sum().item()

    handles = [layer.register_forward_hook(see) for layer in model.quantized_layers()]
    state.weights = state.activations = False
    try:
        for _ in predictions(sd, model, prompts, trace, **settings):
            state.forget()
    finally:
        state.weights, state.activations = switches
        for handle in handles:
            handle.remove()
    return {name: error / whole for name, (error, whole) in errors.items() if whole > 0}
