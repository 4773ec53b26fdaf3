"""Metrics of generated images with confidence intervals; times, arithmetic and memory of models."""

from sdcomp.evaluation.bootstrap import bootstrap
from sdcomp.evaluation.cache import cached_images, cached_trace
from sdcomp.evaluation.clip_judge import Clip
from sdcomp.evaluation.confidence_intervals import Estimate
from sdcomp.evaluation.float_precision import fix_precision, precision_facts
from sdcomp.evaluation.image_files import load_images
from sdcomp.evaluation.kid_and_frechet import frechet_distance, kid_values
from sdcomp.evaluation.layer_errors import layer_errors, output_errors
from sdcomp.evaluation.memory import peak_memory, weight_bytes
from sdcomp.evaluation.metrics import (
    UNITS,
    clip_scores,
    decibels,
    psnr,
    scores,
    squared_errors,
    ssim,
)
from sdcomp.evaluation.noise_errors import branch_errors, noise_mse, path_predictions, step_weights
from sdcomp.evaluation.path_errors import PathErrors, path_errors, thinned
from sdcomp.evaluation.profile import component_times, layer_profile, machine_peaks, macs
from sdcomp.evaluation.prompt_sets import Prompts, load_prompts
from sdcomp.evaluation.statistics import applicable, estimate, paired_difference, share_estimate
from sdcomp.evaluation.timing import interleaved_times, median

__all__ = [
    "UNITS",
    "Clip",
    "Estimate",
    "PathErrors",
    "Prompts",
    "applicable",
    "bootstrap",
    "branch_errors",
    "cached_images",
    "cached_trace",
    "clip_scores",
    "component_times",
    "decibels",
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
    "path_predictions",
    "peak_memory",
    "precision_facts",
    "psnr",
    "scores",
    "share_estimate",
    "squared_errors",
    "ssim",
    "step_weights",
    "thinned",
    "weight_bytes",
]
