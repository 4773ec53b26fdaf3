"""The error of a compressed UNet's noise predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdcomp.model import StableDiffusion, Trace


@torch.no_grad()
def noise_mse(
    sd: StableDiffusion,
    unet: nn.Module,
    prompts: list[str],
    trace: Trace,
    *,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Mean squared error of guided noise predictions for each step and image, `(S, N)`.

    `trace` is that of `sd.generate(prompts, ...)` with the full UNet. `unet` predicts the noise of the same
    latents, so errors do not add up over the steps. The default `batch_size` is the model's own. Raises
    ValueError unless there is one prompt for each image of the trace.
    """
    steps, n = trace.latents.shape[:2]
    if len(prompts) != n:
        raise ValueError(
            f"{len(prompts)} prompts for a trace of {n} images: give those that it was made with"
        )
    batch_size = batch_size or sd.batch_size
    scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    variant = sd.replace(unet=unet)
    errors = []
    bar = tqdm(total=-(-n // batch_size) * steps, desc="noise MSE", disable=not progress)
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        texts = prompts[rows]
        if scale != 1:
            texts = [negative_prompt] * len(texts) + texts
        context = sd.encode_prompts(texts)
        batch = []
        for timestep, latents, wanted in zip(
            trace.timesteps.tolist(), trace.latents, trace.noise_predictions, strict=True
        ):
            found = variant.predict_noise(latents[rows].to(sd.device), timestep, context, scale)
            batch.append((found.float().cpu() - wanted[rows]).square().mean((1, 2, 3)))
            bar.update()
        errors.append(torch.stack(batch))
    bar.close()
    return torch.cat(errors, dim=1)
