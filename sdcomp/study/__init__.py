"""What notebooks share: parameters, variants, records of runs, paired measurements, plots."""

from sdcomp.study.answers import answer
from sdcomp.study.build import Builder, as_executed, calibration_settings
from sdcomp.study.paired import PairedStudy, reference_images
from sdcomp.study.parameters import ParameterError, read_parameters
from sdcomp.study.plan import bit_pairs, check_calibration, needs_intervals, pruned_variants
from sdcomp.study.plots import (
    bits_map,
    difference_bars,
    error_band,
    error_dots,
    heat_map,
    image_grid,
    label_ends,
    scatter,
    style,
)
from sdcomp.study.requests import requested
from sdcomp.study.run import Run
from sdcomp.study.times import PairedTimes
from sdcomp.study.variants import FP32, Variant, pruned, quantized

__all__ = [
    "FP32",
    "Builder",
    "PairedStudy",
    "PairedTimes",
    "ParameterError",
    "Run",
    "Variant",
    "answer",
    "as_executed",
    "bit_pairs",
    "bits_map",
    "calibration_settings",
    "check_calibration",
    "difference_bars",
    "error_band",
    "error_dots",
    "heat_map",
    "image_grid",
    "label_ends",
    "needs_intervals",
    "pruned",
    "pruned_variants",
    "quantized",
    "read_parameters",
    "reference_images",
    "requested",
    "scatter",
    "style",
]
