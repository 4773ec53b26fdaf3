"""Compressed UNets in other tools: diffusers' pipelines."""

from sdcomp.export.diffusers import as_diffusers_unet, from_diffusers_unet

__all__ = ["as_diffusers_unet", "from_diffusers_unet"]
