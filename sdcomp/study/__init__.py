"""What notebooks share: checked parameters, run records, plots."""

from sdcomp.study.paired import PairedStudy
from sdcomp.study.parameters import ParameterError, read_parameters
from sdcomp.study.plots import error_band, heat_map, image_grid, label_ends, scatter, style
from sdcomp.study.run import Run

__all__ = [
    "PairedStudy",
    "ParameterError",
    "Run",
    "error_band",
    "heat_map",
    "image_grid",
    "label_ends",
    "read_parameters",
    "scatter",
    "style",
]
