"""Integer execution of calibrated models: int8 weights, and oneDNN's kernels where there are any."""

from sdcomp.integer.conversion import to_int8
from sdcomp.integer.execution import choose_execution
from sdcomp.integer.files import load_int8, save_int8
from sdcomp.integer.model import Int8Model

__all__ = ["Int8Model", "choose_execution", "load_int8", "save_int8", "to_int8"]
