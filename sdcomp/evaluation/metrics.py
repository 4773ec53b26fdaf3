"""Scores of single images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from sdcomp.evaluation.bootstrap import bootstrap
from sdcomp.evaluation.clip_judge import Clip
from sdcomp.evaluation.confidence_intervals import Estimate
from sdcomp.evaluation.non_finite import require_finite
from sdcomp.evaluation.prompt_sets import Prompts
from sdcomp.model import StableDiffusion
from sdcomp.scenes import prompt_accuracy

ROUNDING = 0.01
"""Pixels may lie this far outside [0, 1]: more than float16 and bfloat16 round."""


def clip_scores(clip: Clip, images: Tensor, prompts: list[str]) -> Tensor:
    """CLIP score of each image with its prompt, `(N,)`: 100 x cosine, at least 0 (Hessel et al. 2021).

    The scale is that of torchmetrics. `images`: `(N, 3, H, W)` in [0, 1]. Raises ValueError for images that
    are not floating point in [0, 1] and for another number of prompts, and NonFiniteError for pixels that are
    not finite.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: give one for each")
    _check_pixels(images)
    cosine = F.cosine_similarity(clip.embed_images(images), clip.embed_texts(prompts))
    return 100 * cosine.clamp(min=0)


def psnr(images: Tensor, baseline: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The `decibels` of the `squared_errors` between images `(N, 3, H, W)` in [0, 1] and their baselines."""
    return decibels(squared_errors(images, baseline), groups)


def squared_errors(images: Tensor, baseline: Tensor) -> Tensor:
    """The mean squared error of each image `(N, 3, H, W)` in [0, 1] to its baseline, `(N,)` in float64.

    Raises ValueError for images that are not floating point in [0, 1] or have another shape than the
    baseline, and NonFiniteError for pixels that are not finite.
    """
    _check_pairs(images, baseline)
    # Numbers, not tensors: a small tensor for each image would keep the allocator from reusing memory.
    errors = [(a.double() - b).square().mean().item() for a, b in zip(images, baseline, strict=True)]
    return torch.tensor(errors, dtype=torch.float64)


def decibels(squared: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """Peak signal-to-noise ratio in dB from the squared errors of images `(N,)`.

    The mean of the squared errors is converted to decibels, not each image's error. Raises the errors of
    `bootstrap`.
    """
    return bootstrap(squared, lambda mse: -10 * np.log10(np.maximum(mse, 1e-12)), groups)


def ssim(images: Tensor, baseline: Tensor) -> Tensor:
    """Structural similarity of each image `(N, 3, H, W)` in [0, 1] with its baseline, `(N,)`.

    Wang et al. 2004, computed by torchmetrics. Raises the errors of `squared_errors`.
    """
    _check_pairs(images, baseline)
    # One image at a time: torchmetrics keeps five filtered copies of its input.
    pairs = zip(images.split(1), baseline.split(1), strict=True)
    return torch.cat(
        [structural_similarity_index_measure(a, b, data_range=1.0, reduction="none") for a, b in pairs]
    )


def _check_pairs(images: Tensor, baseline: Tensor) -> None:
    if images.shape != baseline.shape:
        raise ValueError(f"images {tuple(images.shape)} and baseline {tuple(baseline.shape)} must be alike")
    _check_pixels(images, baseline)


def _check_pixels(*images: Tensor) -> None:
    """Refuse images that are not floating point in [0, 1], apart from rounding, or not finite."""
    require_finite("pixels", *images)
    for batch in images:
        low, high = batch.detach().aminmax() if batch.numel() else (0, 1)
        if not batch.is_floating_point() or low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError("images must be floating point in [0, 1]: scale them first")


def scores(
    sd: StableDiffusion, images: Tensor, prompts: Prompts, clip: Clip | None = None
) -> dict[str, Tensor]:
    """All scores of single images for which the model has a judge, `(N,)` each.

    "prompt accuracy" (bool) needs the model's reader, "CLIP score" needs its image encoder or a `clip`.
    Raises ValueError for images that are not floating point in [0, 1], and NonFiniteError for pixels that are
    not finite.
    """
    _check_pixels(images)
    found: dict[str, Tensor] = {}
    if sd.reader is not None and prompts.scenes is not None:
        found["prompt accuracy"] = prompt_accuracy(sd.reader, images, prompts.scenes).all_right
    if clip is None and sd.clip is not None:
        clip = Clip.of(sd)
    if clip is not None:
        found["CLIP score"] = clip_scores(clip, images, prompts.texts)
    return found


UNITS = {"prompt accuracy": "%", "CLIP score": "100 x cosine"}
"""The units of the scores that `estimate` returns."""
