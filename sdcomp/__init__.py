"""Measure how far a latent diffusion model can be quantized and pruned, and what is really gained."""

from sdcomp.model import SD15, TINY, ModelError, StableDiffusion, load

__all__ = ["SD15", "TINY", "ModelError", "StableDiffusion", "load"]
