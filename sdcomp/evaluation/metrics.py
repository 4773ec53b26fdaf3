"""Per-image metrics of generated images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from sdcomp.evaluation.clip import Clip
from sdcomp.evaluation.prompts import Prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap, require_finite
from sdcomp.model import StableDiffusion
from sdcomp.scenes import prompt_accuracy


def clip_scores(clip: Clip, images: Tensor, prompts: list[str]) -> Tensor:
    """CLIP score of each image with its prompt, `(N,)`: 100 x cosine, at least 0 (Hessel et al. 2021).

    The scale is torchmetrics'. `images` `(N, 3, H, W)` in [0, 1]. Raises ValueError for images that are
    not floating point and for another number of prompts, and NonFiniteError for pixels that are not finite.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: give one for each")
    require_finite("pixels", images)
    cosine = F.cosine_similarity(clip.embed_images(images), clip.embed_texts(prompts))
    return 100 * cosine.clamp(min=0)


def psnr(images: Tensor, baseline: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """Peak signal-to-noise ratio in dB of images `(N, 3, H, W)` in [0, 1] to their baselines.

    The squared error is averaged over images before it becomes decibels. Raises ValueError for images
    that are not floating point or not of the baseline's shape, and NonFiniteError.
    """
    _check_pairs(images, baseline)
    errors = torch.stack([(a.double() - b).square().mean() for a, b in zip(images, baseline, strict=True)])
    return bootstrap(errors, lambda mse: -10 * np.log10(np.maximum(mse, 1e-12)), groups)


def ssim(images: Tensor, baseline: Tensor) -> Tensor:
    """Structural similarity of each image `(N, 3, H, W)` in [0, 1] to its baseline, `(N,)`.

    Wang et al. 2004, by torchmetrics. Raises ValueError for images that are not floating point or not of the
    baseline's shape, and NonFiniteError.
    """
    _check_pairs(images, baseline)
    # One at a time: torchmetrics keeps five filtered copies of all that it is given.
    pairs = zip(images.split(1), baseline.split(1), strict=True)
    return torch.cat(
        [structural_similarity_index_measure(a, b, data_range=1.0, reduction="none") for a, b in pairs]
    )


def _check_pairs(images: Tensor, baseline: Tensor) -> None:
    if not (images.is_floating_point() and baseline.is_floating_point()):
        raise ValueError("images must be floating point in [0, 1]")
    if images.shape != baseline.shape:
        raise ValueError(f"images {tuple(images.shape)} and baseline {tuple(baseline.shape)} must be alike")
    require_finite("pixels", images, baseline)


def scores(
    sd: StableDiffusion, images: Tensor, prompts: Prompts, clip: Clip | None = None
) -> dict[str, Tensor]:
    """Every per-image score that there is a judge for, `(N,)` each.

    "prompt accuracy" (bool) where a reader comes with the model, "CLIP score" where an image encoder does
    or a `clip` is given. Raises NonFiniteError for images that are not finite.
    """
    require_finite("pixels", images)
    found: dict[str, Tensor] = {}
    if sd.reader is not None and prompts.scenes is not None:
        found["prompt accuracy"] = prompt_accuracy(sd.reader, images, prompts.scenes).all_right
    if clip is None and sd.clip is not None:
        clip = Clip.of(sd)
    if clip is not None:
        found["CLIP score"] = clip_scores(clip, images, prompts.texts)
    return found


UNITS = {"prompt accuracy": "%", "CLIP score": "100 x cosine"}
"""Units of the scores, as `estimate` gives them."""
