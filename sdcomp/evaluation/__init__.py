"""Metrics of generated images with confidence intervals; times, arithmetic and memory of models."""

from sdcomp.evaluation.cache import cached_images, cached_trace
from sdcomp.evaluation.clip import Clip
from sdcomp.evaluation.distances import frechet_distance, kid_values
from sdcomp.evaluation.images import load_images
from sdcomp.evaluation.metrics import UNITS, clip_scores, psnr, scores, ssim
from sdcomp.evaluation.noise import noise_mse
from sdcomp.evaluation.path import PathErrors, layer_errors, output_errors, path_errors, thinned
from sdcomp.evaluation.precision import fix_precision, precision_facts
from sdcomp.evaluation.profile import (
    component_times,
    layer_profile,
    machine_peaks,
    macs,
    weight_bytes,
)
from sdcomp.evaluation.prompts import Prompts, load_prompts
from sdcomp.evaluation.statistics import (
    Estimate,
    applicable,
    bootstrap,
    estimate,
    paired_difference,
    share_estimate,
)
from sdcomp.evaluation.timing import interleaved_times, median, peak_memory

__all__ = [
    "UNITS",
    "Clip",
    "Estimate",
    "PathErrors",
    "Prompts",
    "applicable",
    "bootstrap",
    "cached_images",
    "cached_trace",
    "clip_scores",
    "component_times",
    "estimate",
    "fix_precision",
    "frechet_distance",
    "interleaved_times",
    "kid_values",
    "layer_errors",
    "layer_profile",
    "load_images",
    "load_prompts",
    "machine_peaks",
    "macs",
    "median",
    "noise_mse",
    "output_errors",
    "paired_difference",
    "path_errors",
    "peak_memory",
    "precision_facts",
    "psnr",
    "scores",
    "share_estimate",
    "ssim",
    "thinned",
    "weight_bytes",
]
