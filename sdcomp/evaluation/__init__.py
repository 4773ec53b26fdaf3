"""Metrics of generated images, and their statistics."""

from sdcomp.evaluation.cache import cached_images
from sdcomp.evaluation.metrics import UNITS, clip_scores, psnr, scores
from sdcomp.evaluation.prompts import Prompts, load_prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap, estimate, paired_difference

__all__ = [
    "UNITS",
    "Estimate",
    "Prompts",
    "bootstrap",
    "cached_images",
    "clip_scores",
    "estimate",
    "load_prompts",
    "paired_difference",
    "psnr",
    "scores",
]
