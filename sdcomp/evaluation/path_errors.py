"""The errors of a compressed UNet along the sampling path.

The squared error of a single noise prediction does not tell whether errors cancel or add up on the way to an
image. So there are other measures beside `noise_mse`: the signed error along the prediction, and the error of
the final latents along the compressed UNet's own path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdcomp.evaluation.noise_errors import predictions
from sdcomp.model import StableDiffusion, Trace
from sdcomp.model.samplers import make_sampler


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
