"""Measure how far a latent diffusion model can be quantized and pruned, and what is really gained."""

from sdcomp.compressed import load, save
from sdcomp.model import (
    SD15,
    TINY,
    ModelError,
    StableDiffusion,
    as_diffusers_unet,
    from_diffusers_unet,
    load_from_standard_weights,
)
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel

__all__ = [
    "SD15",
    "TINY",
    "Calibrator",
    "ModelError",
    "QuantModel",
    "StableDiffusion",
    "TimeStepCalibratedQuantModel",
    "as_diffusers_unet",
    "from_diffusers_unet",
    "load",
    "load_from_standard_weights",
    "save",
]
