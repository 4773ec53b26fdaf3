"""What notebooks share: checked parameters, run records, plots."""

from sdcomp.study.paired import PairedStudy
from sdcomp.study.parameters import ParameterError, read_parameters
from sdcomp.study.plots import error_band, image_grid, style
from sdcomp.study.run import Run

__all__ = ["PairedStudy", "ParameterError", "Run", "error_band", "image_grid", "read_parameters", "style"]
