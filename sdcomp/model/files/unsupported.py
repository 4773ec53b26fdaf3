"""Files of unsupported models: SDXL, SD 2, LoRA, ... Each is recognised, and refused by its name.

Single files are known by the names and shapes of their tensors, diffusers folders by their settings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.model.config import ModelConfig
from sdcomp.model.files.tensors import ModelError, one_line

WANTED_FILE = "; give a checkpoint of Stable Diffusion 1.x, such as v1-5-pruned-emaonly.safetensors"
WANTED_FOLDER = "; give a folder of Stable Diffusion 1.x, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
"""The ends of messages: what to give instead."""
_INDEX = "; give the folder that has model_index.json"
# Names of tensors. Other models may also have tensors with the names of our UNet.
_OTHER_MODELS = (
    (r"conditioner\.embedders\.", "is an SDXL checkpoint" + WANTED_FILE),
    (r"cond_stage_model\.model\.", "is a Stable Diffusion 2.x checkpoint" + WANTED_FILE),
    (r"model\.diffusion_model\.joint_blocks\.", "is a Stable Diffusion 3 checkpoint" + WANTED_FILE),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux checkpoint" + WANTED_FILE),
    (r"control_model\.", "is a ControlNet" + WANTED_FILE),
    (r"lora_|.*\.lora", "is a LoRA, a change to a model; load the model with loras={file: scale}"),
)
_OTHER_FILES = (
    (r"emb_params|string_to_param", "is a textual inversion embedding" + WANTED_FILE),
    (r"down_blocks\.", "is the UNet of a diffusers folder" + _INDEX),
    (r"encoder\.down_blocks\.", "is the VAE of a diffusers folder" + _INDEX),
    (r"input_blocks\.", "is a UNet alone and has no config.json; give the whole model folder"),
    (r"encoder\.|decoder\.", "is an autoencoder alone and has no config.json; give the whole model folder"),
    (r"(text_model\.)?embeddings\.", "is a text encoder alone; give the whole model folder"),
)
_KINDS_BY_CHANNELS = {8: "an image-editing (InstructPix2Pix)", 9: "an inpainting"}
_KINDS_BY_TEXT_WIDTH = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_CONTEXT = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_OTHER_PARTS = {"text_encoder_2", "transformer", "prior", "controlnet"}


def refuse_tensor_names(file: Path, names: Collection[str], whole: bool) -> None:
    """Raise ModelError if tensors' names are those of another model, or of a part if the file is not `whole`.

    A whole file has a UNet in the original layout.
    """
    for pattern, sentence in _OTHER_MODELS if whole else _OTHER_MODELS + _OTHER_FILES:
        if any(re.match(pattern, name) for name in names):
            raise ModelError(f"{file} {sentence}")


def refuse_tensor_shapes(file: Path, unet: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise ModelError, with the model's name, for a relative of SD 1.x with another input or text width."""
    first, context = unet.get("input_blocks.0.0.weight"), unet.get(_CONTEXT)
    if first is not None and first.dim() == 4 and (n := first.shape[1]) != config.unet.in_channels:
        kind, wanted = _KINDS_BY_CHANNELS.get(n, "another"), config.unet.in_channels
        raise ModelError(f"{file} is {kind} model: its UNet takes {n} channels, not {wanted}{WANTED_FILE}")
    if context is not None and context.dim() == 2 and (n := context.shape[1]) != config.unet.context_dim:
        kind = _KINDS_BY_TEXT_WIDTH.get(n, "another model")
        raise ModelError(f"{file} has the UNet of {kind}, for text states of {n} values{WANTED_FILE}")


def refuse_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise ModelError for a `model_index.json` of a pipeline with other parts than SD 1.x's."""
    if _OTHER_PARTS & index.keys() or not {"unet", "vae", "text_encoder"} <= index.keys():
        kind = index.get("_class_name", "model of another kind")
        raise ModelError(f"{folder} holds a {one_line(str(kind))[:100]}{WANTED_FOLDER}")


def refuse_unet_settings(context_dim: object, heads: Collection[object]) -> None:
    """Raise UserError for the text width or the different numbers of heads of SD 2.x's UNet."""
    if context_dim == 1024 or len(heads) > 1:
        raise UserError("it is of Stable Diffusion 2.x" + WANTED_FOLDER)
