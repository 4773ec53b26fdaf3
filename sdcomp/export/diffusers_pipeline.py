"""Folders for diffusers of UNets that lost channels or blocks, and their loader."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.export.checkpoint import rounded_unet
from sdcomp.files import resolve_input, write_text
from sdcomp.model import ModelError, StableDiffusion
from sdcomp.model.bypass import Bypass
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.model.files.diffusers_config import latent_size, unet_config, unet_settings
from sdcomp.model.files.diffusers_folder import write_diffusers
from sdcomp.model.files.names import unet_name
from sdcomp.model.files.replacement import replacing_model
from sdcomp.model.files.tensors import one_line, read_json, read_tensors

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

CHANNELS = Path("unet", "unet_channels.json")
"""The file with the units that each part of the UNet kept, under diffusers' names."""


def save_diffusers(sd: StableDiffusion, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a folder for diffusers, also of a UNet that lost channels or blocks; return the folder.

    `load_diffusers` makes a pipeline of it. The rounded weights of a quantized UNet are baked in. `dtype`
    converts the written weights.

    Raises ModelError for a UNet that is not ours, UserError for a file that cannot be written.
    """
    unet, config = rounded_unet(sd.unet), sd.config
    parts = {
        "unet": unet,
        "encoder": sd.encoder,
        "decoder": sd.decoder,
        "text_encoder": sd.text_encoder,
    }
    states = {name: part.state_dict() for name, part in parts.items()}
    kept = {unet_name(f"{name}.", config.unet)[:-1]: units for name, units in channel_map(unet).items()}
    with replacing_model(folder):
        write_diffusers(config, states, sd.tokenizer, folder, dtype)
        if kept:
            write_text(folder / CHANNELS, json.dumps(kept) + "\n")
    return folder


def load_diffusers(folder: str | Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Load a pipeline of diffusers from a folder that `export` wrote, on the CPU.

    Only numbers are read from the folder: no code, no pickle. The UNet has the class
    `UNet2DConditionModel`; its layers have the sizes that `unet_channels.json` tells.

    Raises ModelError for a file that is missing, damaged or does not fit, UserError without diffusers.
    """
    try:
        # Only this function needs diffusers.
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    except ImportError:
        raise UserError("load_diffusers makes a pipeline of diffusers: pip install diffusers") from None
    folder = resolve_input(folder)
    wrong = "does not describe a UNet that can be loaded"
    settings = read_json(
        folder / "unet" / "config.json", lambda v: unet_settings(unet_config(v), latent_size(v)), wrong
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
    if os.path.lexists(folder / CHANNELS):
        read_json(folder / CHANNELS, partial(_shrink, unet), "does not fit the UNet")
    state = read_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    try:
        unet.load_state_dict(state, assign=True)
        return StableDiffusionPipeline.from_pretrained(
            folder, unet=unet.eval(), local_files_only=True, use_safetensors=True
        ).to(dtype)
    except Exception as error:  # of many kinds, from PyTorch, diffusers and transformers
        raise ModelError(f"no pipeline can be loaded from {folder}: {one_line(error)}") from error


class _NoTransformer(Bypass):
    """A removed transformer, called as diffusers' UNet calls it: returns a tuple of the feature maps."""

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor]:
        return (super().forward(*args, **kwargs),)


def _shrink(unet: nn.Module, kept: dict[str, list[int]]) -> None:
    """Shrink a whole UNet of diffusers to the units that are kept. Raises ValueError for a wrong map."""
    # A whole transformer is no group of diffusers' UNets, since its caller expects a tuple.
    gone = [name for name, units in kept.items() if re.search(r"attentions\.\d+$", name) and units == []]
    apply_channel_map(unet, {name: units for name, units in kept.items() if name not in gone})
    for name in gone:
        unet.set_submodule(name, _NoTransformer(unet.get_submodule(name).proj_out.bias, "", None))
