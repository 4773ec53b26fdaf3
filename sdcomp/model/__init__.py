"""The latent diffusion model: Stable Diffusion 1.x's architecture, loaded, sampled and saved."""

from sdcomp.model.config import SD15, TINY, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from sdcomp.model.loading import ModelError, load, save, weights_digest
from sdcomp.model.samplers import SAMPLERS, make_sampler
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.stable_diffusion import StableDiffusion, Trace
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
    "load",
    "make_sampler",
    "save",
    "weights_digest",
]
