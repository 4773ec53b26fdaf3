"""Metrics of generated images, and their statistics."""

from sdcomp.evaluation.cache import cached_images, cached_trace
from sdcomp.evaluation.clip import Clip
from sdcomp.evaluation.distances import frechet_distance, kid_values, load_images
from sdcomp.evaluation.metrics import UNITS, clip_scores, psnr, scores, ssim
from sdcomp.evaluation.noise import noise_mse
from sdcomp.evaluation.profile import (
    component_times,
    layer_profile,
    machine_peaks,
    macs,
    weight_bytes,
)
from sdcomp.evaluation.prompts import Prompts, load_prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap, estimate, paired_difference
from sdcomp.evaluation.timing import interleaved_times, median

__all__ = [
    "UNITS",
    "Clip",
    "Estimate",
    "Prompts",
    "bootstrap",
    "cached_images",
    "cached_trace",
    "clip_scores",
    "component_times",
    "estimate",
    "frechet_distance",
    "interleaved_times",
    "kid_values",
    "layer_profile",
    "load_images",
    "load_prompts",
    "machine_peaks",
    "macs",
    "median",
    "noise_mse",
    "paired_difference",
    "psnr",
    "scores",
    "ssim",
    "weight_bytes",
]
