"""What notebooks share: checked parameters, run records, paired measurements, plots."""

from sdcomp.study.paired import PairedStudy, reference_images
from sdcomp.study.parameters import ParameterError, read_parameters
from sdcomp.study.plots import error_band, heat_map, image_grid, label_ends, scatter, style
from sdcomp.study.pruned import pruned
from sdcomp.study.quantized import bit_pairs, check_calibration, needs_intervals
from sdcomp.study.run import Run
from sdcomp.study.times import PairedTimes

__all__ = [
    "PairedStudy",
    "PairedTimes",
    "ParameterError",
    "Run",
    "bit_pairs",
    "check_calibration",
    "error_band",
    "heat_map",
    "image_grid",
    "label_ends",
    "needs_intervals",
    "pruned",
    "read_parameters",
    "reference_images",
    "scatter",
    "style",
]
