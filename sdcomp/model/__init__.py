"""The latent diffusion model, Stable Diffusion 1.x's architecture: load, generate and save."""

from sdcomp.model.config import SD15, TINY, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from sdcomp.model.files.hub import is_hub_name, local_model
from sdcomp.model.files.loading import load, load_from_standard_weights, save, weights_digest
from sdcomp.model.files.tensors import ModelError
from sdcomp.model.pipeline import StableDiffusion, Trace
from sdcomp.model.samplers import SAMPLERS, make_sampler
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder

__all__ = [
    "SAMPLERS",
    "SD15",
    "TINY",
    "ModelConfig",
    "ModelError",
    "NoiseSchedule",
    "ScheduleConfig",
    "StableDiffusion",
    "Trace",
    "UNet",
    "UNetConfig",
    "VAEConfig",
    "VAEDecoder",
    "VAEEncoder",
    "is_hub_name",
    "load",
    "load_from_standard_weights",
    "local_model",
    "make_sampler",
    "save",
    "weights_digest",
]
