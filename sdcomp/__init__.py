"""Measure how far a latent diffusion model can be quantized and pruned, and what is really gained."""

import warnings

# Silence tqdm's warning when ipywidgets is missing.
warnings.filterwarnings("ignore", message="IProgress not found")

from sdcomp.export import as_diffusers_unet, from_diffusers_unet  # noqa: E402
from sdcomp.integer import PackedModel, to_int8, to_packed  # noqa: E402
from sdcomp.model import (  # noqa: E402
    SD15,
    TINY,
    ModelError,
    StableDiffusion,
    load_from_standard_weights,
)
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel  # noqa: E402
from sdcomp.saving import load, save  # noqa: E402

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
