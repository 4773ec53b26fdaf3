"""The error of a compressed UNet's noise predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcomp.model import StableDiffusion, Trace


@torch.no_grad()
def predictions(
    sd: StableDiffusion,
    unet: nn.Module,
    prompts: list[str],
    trace: Trace,
    *,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield a UNet's guided noise predictions along a trace: step, rows, found and wanted `(rows, C, h, w)`.

    `trace` is that of `sd.generate(prompts, ...)` with the full UNet, which predicted `wanted`. `unet`
    predicts the noise of the same latents, so errors do not add up over the steps. The default `batch_size`
    is the model's own. Raises ValueError unless there is one prompt for each image of the trace.
    """
    steps, n = trace.latents.shape[:2]
    if len(prompts) != n:
        raise ValueError(
            f"{len(prompts)} prompts for a trace of {n} images: give those that it was made with"
        )
    batch_size = batch_size or sd.batch_size
    scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    variant = sd.replace(unet=unet)
    with tqdm(total=-(-n // batch_size) * steps, desc="noise predictions", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            rows = slice(start, start + batch_size)
            texts = prompts[rows]
            if scale != 1:
                texts = [negative_prompt] * len(texts) + texts
            context = sd.encode_prompts(texts)
            for step, timestep in enumerate(trace.timesteps.tolist()):
                latents = trace.latents[step, rows].to(sd.device)
                found = variant.predict_noise(latents, timestep, context, scale)
                yield step, rows, found.float().cpu(), trace.noise_predictions[step, rows]
                bar.update()


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
