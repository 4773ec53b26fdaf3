"""Per-image metrics of generated images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdcomp.evaluation.prompts import Prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap
from sdcomp.model import StableDiffusion
from sdcomp.model.text import clip_pixels, tokenize
from sdcomp.scenes import prompt_accuracy


@torch.inference_mode()
def clip_scores(sd: StableDiffusion, images: Tensor, prompts: list[str], batch_size: int = 128) -> Tensor:
    """CLIP score of each image with its prompt, `(N,)`: 100 x cosine, at least 0 (Hessel et al. 2021).

    The scale is torchmetrics'. `images` `(N, 3, H, W)` in [0, 1]. Raises ValueError for a model without
    an image encoder, for images that are not floating point, and for another number of prompts.
    """
    if sd.clip is None:
        raise ValueError("this model has no CLIP image encoder, so it has no CLIP score")
    if not images.is_floating_point():
        raise ValueError("images must be floating point in [0, 1]")
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: give one for each")
    scores = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        pixels = clip_pixels(images[rows].to(sd.device, sd.dtype))
        ids = tokenize(sd.tokenizer, prompts[rows]).to(sd.device)
        image = sd.clip.get_image_features(pixels).pooler_output
        text = sd.clip.get_text_features(ids).pooler_output
        scores.append(100 * F.cosine_similarity(image, text).clamp(min=0).float().cpu())
    return torch.cat(scores)


def psnr(images: Tensor, baseline: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """Peak signal-to-noise ratio in dB of images `(N, 3, H, W)` in [0, 1] to their baselines.

    The squared error is averaged over images before it becomes decibels. Raises ValueError for images
    that are not floating point or not of the baseline's shape.
    """
    if not (images.is_floating_point() and baseline.is_floating_point()):
        raise ValueError("images must be floating point in [0, 1]")
    if images.shape != baseline.shape:
        raise ValueError(f"images {tuple(images.shape)} and baseline {tuple(baseline.shape)} must be alike")
    errors = (images.double() - baseline.double()).square().mean((1, 2, 3))
    return bootstrap(errors, lambda mse: -10 * np.log10(np.maximum(mse, 1e-12)), groups)


def scores(sd: StableDiffusion, images: Tensor, prompts: Prompts) -> dict[str, Tensor]:
    """Every per-image score that the model can give, `(N,)` each.

    "prompt accuracy" (bool) where a reader comes with it, "CLIP score" where an image encoder does.
    """
    found: dict[str, Tensor] = {}
    if sd.reader is not None and prompts.scenes is not None:
        found["prompt accuracy"] = prompt_accuracy(sd.reader, images, prompts.scenes).all_right
    if sd.clip is not None:
        found["CLIP score"] = clip_scores(sd, images, prompts.texts)
    return found


UNITS = {"prompt accuracy": "%", "CLIP score": "100 x cosine"}
"""Units of the scores, as `estimate` gives them."""
