"""Simulated n-bit quantization of any `nn.Module`, plain and timestep-aware, and its calibration."""

from sdcomp.quantization.calibration import Calibrator
from sdcomp.quantization.describe import describe
from sdcomp.quantization.layer_sets import FILTERS, published_filters
from sdcomp.quantization.layers import QuantConv2d, QuantLayer, QuantLinear
from sdcomp.quantization.mixed_bits import choose_bits, weight_overrides
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.not_calibrated import NotCalibratedError
from sdcomp.quantization.observer import CalibrationError
from sdcomp.quantization.quantization_files import QuantizationFileError, load_quant_model, save_quant_model
from sdcomp.quantization.quantize import apply_recipe, quantize
from sdcomp.quantization.quantizer import UniformQuantizer, UniformSymmetricQuantizer, fake_quantize
from sdcomp.quantization.recipes import PRESETS, Recipe, build

__all__ = [
    "FILTERS",
    "PRESETS",
    "CalibrationError",
    "Calibrator",
    "NotCalibratedError",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantModel",
    "QuantizationFileError",
    "Recipe",
    "TimeStepCalibratedQuantModel",
    "UniformQuantizer",
    "UniformSymmetricQuantizer",
    "apply_recipe",
    "build",
    "choose_bits",
    "describe",
    "fake_quantize",
    "load_quant_model",
    "published_filters",
    "quantize",
    "save_quant_model",
    "weight_overrides",
]
