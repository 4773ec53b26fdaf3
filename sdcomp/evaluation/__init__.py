"""Metrics of generated images, and their statistics."""

from sdcomp.evaluation.metrics import clip_scores, psnr
from sdcomp.evaluation.prompts import Prompts, load_prompts
from sdcomp.evaluation.statistics import Estimate, bootstrap

__all__ = ["Estimate", "Prompts", "bootstrap", "clip_scores", "load_prompts", "psnr"]
