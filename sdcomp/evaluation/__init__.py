"""Metrics of generated images, and their statistics."""

from sdcomp.evaluation.cache import cached_images, cached_trace
from sdcomp.evaluation.clip import Clip
from sdcomp.evaluation.distances import frechet_distance, kid_values, load_images
from sdcomp.evaluation.metrics import UNITS, clip_scores, psnr, scores, ssim
from sdcomp.evaluation.noise import noise_mse
from sdcomp.evaluation.prompts import Prompts, load_prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap, estimate, paired_difference

__all__ = [
    "UNITS",
    "Clip",
    "Estimate",
    "Prompts",
    "bootstrap",
    "cached_images",
    "cached_trace",
    "clip_scores",
    "estimate",
    "frechet_distance",
    "kid_values",
    "load_images",
    "load_prompts",
    "noise_mse",
    "paired_difference",
    "psnr",
    "scores",
    "ssim",
]
