"""The error of a compressed UNet's noise predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcomp.model import StableDiffusion, Trace
from sdcomp.model.guidance import BRANCHES, guided
from sdcomp.model.samplers import make_sampler
from sdcomp.model.schedule import NoiseSchedule


@torch.no_grad()
def branch_predictions(
    sd: StableDiffusion,
    unet: nn.Module,
    prompts: list[str],
    trace: Trace,
    *,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield a UNet's noise predictions along a trace: step, rows, predictions `(branches, rows, C, h, w)`.

    `trace` is that of `sd.generate(prompts, ...)` with the full UNet. `unet` predicts the noise of the same
    latents, so errors do not add up over the steps. The branches are the `BRANCHES`. The default `batch_size`
    is the model's own. Raises ValueError unless there is one prompt for each image of the trace.
    """
    steps, n = trace.latents.shape[:2]
    if len(prompts) != n:
        raise ValueError(
            f"{len(prompts)} prompts for a trace of {n} images: give those that it was made with"
        )
    batch_size = batch_size or sd.batch_size
    branches = 1 if _scale(sd, guidance_scale) == 1 else 2
    variant = sd.replace(unet=unet)
    with tqdm(total=-(-n // batch_size) * steps, desc="noise predictions", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            texts = prompts[rows]
            context = sd.encode_prompts([negative_prompt] * len(texts) * (branches - 1) + texts)
            for step, timestep in enumerate(trace.timesteps.tolist()):
                latents = trace.latents[step, rows].to(sd.device).repeat(branches, 1, 1, 1)
                found = variant.predict_noise(latents, timestep, context, 1.0).float().cpu()
                yield step, rows, found.unflatten(0, (branches, -1))
                bar.update()


def _scale(sd: StableDiffusion, guidance_scale: float | None) -> float:
    return sd.config.guidance_scale if guidance_scale is None else guidance_scale


def predictions(
    sd: StableDiffusion,
    unet: nn.Module,
    prompts: list[str],
    trace: Trace,
    *,
    guidance_scale: float | None = None,
    **settings: object,
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield a UNet's guided noise predictions along a trace: step, rows, found and wanted `(rows, C, h, w)`.

    The full UNet predicted `wanted`. The arguments and errors are those of `branch_predictions`.
    """
    scale = _scale(sd, guidance_scale)
    asked = {"guidance_scale": scale, **settings}
    for step, rows, found in branch_predictions(sd, unet, prompts, trace, **asked):
        yield step, rows, guided(found, scale), trace.noise_predictions[step, rows]


def noise_mse(
    sd: StableDiffusion, unet: nn.Module, prompts: list[str], trace: Trace, **settings: object
) -> Tensor:
    """Mean squared error of guided noise predictions for each step and image, `(S, N)`.

    The arguments and errors are those of `predictions`.
    """
    errors = torch.empty(trace.latents.shape[:2])
    for step, rows, found, wanted in predictions(sd, unet, prompts, trace, **settings):
        errors[step, rows] = (found - wanted).square().mean((1, 2, 3))
    return errors


def path_predictions(
    sd: StableDiffusion, unet: nn.Module, prompts: list[str], trace: Trace, **settings: object
) -> Tensor:
    """All of `branch_predictions`, `(branches, S, N, C, h, w)`; the arguments and errors are the same."""
    found = {
        (rows.start, step): part
        for step, rows, part in branch_predictions(sd, unet, prompts, trace, **settings)
    }
    steps, starts = range(len(trace.timesteps)), sorted({start for start, _ in found})
    whole = [torch.cat([found[start, step] for start in starts], 1) for step in steps]
    return torch.stack(whole, 1)


def branch_errors(found: Tensor, wanted: Tensor, scale: float) -> dict[str, Tensor]:
    """Mean squared errors between two `path_predictions`, `(S, N)` each.

    The keys are "guided", and for a guidance `scale` other than 1 also the `BRANCHES`. Guidance multiplies
    the error of the prompt's branch by the scale and that of the other branch by 1 - scale, so the guided
    error alone does not tell how good the UNet's predictions are.
    """
    errors = {"guided": guided(found - wanted, scale).square().mean((2, 3, 4))}
    if len(found) == len(BRANCHES):
        errors |= zip(BRANCHES, (found - wanted).square().mean((3, 4, 5)), strict=True)
    return errors


def step_weights(sampler: str, schedule: NoiseSchedule, steps: int, visited: int | None = None) -> Tensor:
    """How far a unit error of each step's noise prediction moves the final latents, `(visited,)`.

    A sampler's step is linear in latents and prediction. The weights are its coefficients, carried to the end
    by the steps that follow; the UNet's answer to the moved latents is left out. `visited` counts the last
    steps that are taken, by default all. Raises the errors of `make_sampler`.
    """
    solver = make_sampler(sampler, schedule, steps)
    first = steps - (steps if visited is None else visited)
    impulses = torch.eye(steps, dtype=torch.float64)
    latents = torch.zeros(steps, dtype=torch.float64)
    for i in range(first, steps):
        latents = solver.step(i, latents, impulses[i], torch.zeros_like(latents))
    return latents[first:].float()
