"""Measure how far a latent diffusion model can be quantized and pruned, and what is really gained."""

import importlib
import warnings

with warnings.catch_warnings():
    # In a notebook without ipywidgets this module warns when it is imported, and transformers imports it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    importlib.import_module("tqdm.auto")

from sdcomp.export import as_diffusers_unet, from_diffusers_unet
from sdcomp.integer import PackedModel, to_int8, to_packed
from sdcomp.model import (
    SD15,
    TINY,
    ModelError,
    StableDiffusion,
    load_from_standard_weights,
)
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel
from sdcomp.saving import load, save

__all__ = [
    "SD15",
    "TINY",
    "Calibrator",
    "ModelError",
    "PackedModel",
    "QuantModel",
    "StableDiffusion",
    "TimeStepCalibratedQuantModel",
    "as_diffusers_unet",
    "from_diffusers_unet",
    "load",
    "load_from_standard_weights",
    "save",
    "to_int8",
    "to_packed",
]
