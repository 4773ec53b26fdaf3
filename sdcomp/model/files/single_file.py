"""Read and write Stable Diffusion 1.x as one file in its original layout (`.ckpt`, `.safetensors`)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from sdcomp.files import resolve_input
from sdcomp.model.config import SD15, ModelConfig
from sdcomp.model.files.tensors import ModelError, Part, Source, read_tensors, write_tensors

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_TEXT = "cond_stage_model.transformer."
_CONTEXT = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

_WANTED = "; give a checkpoint of Stable Diffusion 1.x, such as v1-5-pruned-emaonly.safetensors"
_FOLDER = "; give the folder that has model_index.json"
# Names that identify other files. Other models may also have tensors with the names of our UNet.
_OTHER_MODELS = (
    (r"conditioner\.embedders\.", "is an SDXL checkpoint" + _WANTED),
    (r"cond_stage_model\.model\.", "is a Stable Diffusion 2.x checkpoint" + _WANTED),
    (r"model\.diffusion_model\.joint_blocks\.", "is a Stable Diffusion 3 checkpoint" + _WANTED),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux checkpoint" + _WANTED),
    (r"control_model\.", "is a ControlNet" + _WANTED),
    (r"lora_|.*\.lora", "is a LoRA, a change to a model; load the model with loras={file: scale}"),
)
_OTHER_FILES = (
    (r"emb_params|string_to_param", "is a textual inversion embedding" + _WANTED),
    (r"down_blocks\.", "is the UNet of a diffusers folder" + _FOLDER),
    (r"encoder\.down_blocks\.", "is the VAE of a diffusers folder" + _FOLDER),
    (r"input_blocks\.", "is a UNet alone and has no config.json; give the whole model folder"),
    (r"encoder\.|decoder\.", "is an autoencoder alone and has no config.json; give the whole model folder"),
    (r"(text_model\.)?embeddings\.", "is a text encoder alone; give the whole model folder"),
)


def read_original(file: Path, config: ModelConfig = SD15) -> Source:
    """Read the parts of a checkpoint in one file; its sizes must be those of `config`.

    Averaged weights (`model_ema.*`), buffers of the schedule and other data of the training are dropped.
    The tokenizer is the one beside the file, else CLIP's own. Raises ModelError for another model.
    """
    tensors = read_tensors(file)
    unet, vae, text = ({} for _ in range(3))
    for prefix, state in ((_UNET, unet), (_VAE, vae), (_TEXT, text)):
        state |= {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    for pattern, sentence in _OTHER_MODELS if unet else _OTHER_MODELS + _OTHER_FILES:
        if any(re.match(pattern, name) for name in tensors):
            raise ModelError(f"{file} {sentence}")
    for prefix, state, what in (
        (_UNET, unet, "UNet"),
        (_VAE, vae, "autoencoder"),
        (_TEXT, text, "text encoder"),
    ):
        if not state:
            raise ModelError(f"{file} has no {what} ({prefix}*){_WANTED}")
    _refuse_relatives(file, unet, config)
    states = {
        "unet": unet,
        "encoder": {
            k: t for k, t in vae.items() if not k.startswith(("decoder.", "post_quant_conv.", "loss."))
        },
        "decoder": {k: t for k, t in vae.items() if k.startswith(("decoder.", "post_quant_conv."))},
        "text_encoder": text_state(text),
    }
    fits = "Stable Diffusion 1.x" if config == SD15 else "the given configuration"
    parts = {name: Part(file, state, fits) for name, state in states.items()}
    return Source(config, parts, tokenizer=_tokenizer_for(file), origin=file)


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a text encoder's tensors transformers' present names; unused tensors are dropped."""
    unused = ("position_ids", "text_projection.weight")
    return {name.removeprefix("text_model."): t for name, t in state.items() if not name.endswith(unused)}


def _refuse_relatives(file: Path, unet: dict[str, Tensor], config: ModelConfig) -> None:
    """Raise ModelError, with the model's name, for a relative of SD 1.x with another input or text width."""
    first, context = unet.get("input_blocks.0.0.weight"), unet.get(_CONTEXT)
    if first is not None and first.dim() == 4 and (n := first.shape[1]) != config.unet.in_channels:
        kind = {8: "an image-editing (InstructPix2Pix)", 9: "an inpainting"}.get(n, "another")
        raise ModelError(
            f"{file} is {kind} model: its UNet takes {n} channels, not {config.unet.in_channels}{_WANTED}"
        )
    if context is not None and context.dim() == 2 and (n := context.shape[1]) != config.unet.context_dim:
        kind = {1024: "Stable Diffusion 2.x", 2048: "SDXL"}.get(n, "another model")
        raise ModelError(f"{file} has the UNet of {kind}, for text states of {n} values{_WANTED}")


def _tokenizer_for(file: Path) -> Path:
    for folder in (file.parent, file.parent / "tokenizer"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    return resolve_input("data/clip_tokenizer")


def write_original(states: dict[str, dict[str, Tensor]], file: Path, dtype: torch.dtype | None) -> Path:
    """Write UNet, encoder, decoder and text encoder to one file in the original layout; return the file."""
    prefixes = {"unet": _UNET, "encoder": _VAE, "decoder": _VAE, "text_encoder": _TEXT + "text_model."}
    write_tensors(
        {prefix + name: t for part, prefix in prefixes.items() for name, t in states[part].items()},
        file,
        dtype,
    )
    return file
