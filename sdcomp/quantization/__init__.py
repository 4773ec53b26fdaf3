"""Simulated n-bit quantization of any `nn.Module`, plain and timestep-aware, and its calibration."""

from sdcomp.quantization.calibration import CalibrationError, Calibrator
from sdcomp.quantization.describe import describe
from sdcomp.quantization.filters import FILTERS, published_filters
from sdcomp.quantization.layers import NotCalibratedError, QuantConv2d, QuantLayer, QuantLinear
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.quantizer import UniformSymmetricQuantizer, fake_quantize
from sdcomp.quantization.recipes import PRESETS, Preset, build
from sdcomp.quantization.storage import QuantizationFileError, load_quant_model, save_quant_model

__all__ = [
    "FILTERS",
    "PRESETS",
    "CalibrationError",
    "Calibrator",
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
    "describe",
    "fake_quantize",
    "load_quant_model",
    "published_filters",
    "save_quant_model",
]
