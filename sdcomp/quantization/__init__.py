"""Simulated n-bit quantization of any `nn.Module`, plain and timestep-aware, and its calibration."""

from sdcomp.quantization.calibration import CalibrationError, Calibrator
from sdcomp.quantization.filters import FILTERS, published_filters
from sdcomp.quantization.int8 import Int8Model, load_int8
from sdcomp.quantization.layers import NotCalibratedError, QuantConv2d, QuantLayer, QuantLinear
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.presets import PRESETS, Preset, build
from sdcomp.quantization.quantizer import UniformSymmetricQuantizer, fake_quantize
from sdcomp.quantization.storage import QuantizationFileError, load_quant_model

__all__ = [
    "FILTERS",
    "PRESETS",
    "CalibrationError",
    "Calibrator",
    "Int8Model",
    "NotCalibratedError",
    "Preset",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantModel",
    "QuantizationFileError",
    "TimeStepCalibratedQuantModel",
    "UniformSymmetricQuantizer",
    "build",
    "fake_quantize",
    "load_int8",
    "load_quant_model",
    "published_filters",
]
