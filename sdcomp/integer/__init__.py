"""Execution of quantized models: n-bit weights, int8 weights, and oneDNN's kernels where there are any."""

from sdcomp.integer.execution import choose_execution
from sdcomp.integer.int8_conversion import to_int8
from sdcomp.integer.int8_files import load_int8, save_int8
from sdcomp.integer.int8_model import Int8Model
from sdcomp.integer.packed_files import load_packed, save_packed
from sdcomp.integer.packed_model import PackedModel, to_packed

__all__ = [
    "Int8Model",
    "PackedModel",
    "choose_execution",
    "load_int8",
    "load_packed",
    "save_int8",
    "save_packed",
    "to_int8",
    "to_packed",
]
