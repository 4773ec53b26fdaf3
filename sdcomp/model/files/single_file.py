"""Read and write Stable Diffusion 1.x as one file in its original layout (`.ckpt`, `.safetensors`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from sdcomp.files import resolve_input
from sdcomp.model.config import SD15, ModelConfig
from sdcomp.model.files.tensors import ModelError, Part, Source, read_tensors, write_weights
from sdcomp.model.files.unsupported import WANTED_FILE, refuse_tensor_names, refuse_tensor_shapes

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
_DECODER = ("decoder.", "post_quant_conv.")
_TEXT = "cond_stage_model.transformer."


def read_original(file: Path, config: ModelConfig = SD15) -> Source:
    """Read the parts of a checkpoint in one file; its sizes must be those of `config`.

    Averaged weights (`model_ema.*`), buffers of the schedule and other data of the training are dropped.
    The tokenizer is the one beside the file, else CLIP's own. Raises ModelError for another model.
    """
    config = dataclasses.replace(config, vision=None, reader=False)  # a single file has neither
    tensors = read_tensors(file)
    unet, vae, text = ({} for _ in range(3))
    for prefix, state in ((_UNET, unet), (_VAE, vae), (_TEXT, text)):
        state |= {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    refuse_tensor_names(file, tensors, whole=bool(unet))
    for prefix, state, what in (
        (_UNET, unet, "UNet"),
        (_VAE, vae, "autoencoder"),
        (_TEXT, text, "text encoder"),
    ):
        if not state:
            raise ModelError(f"{file} has no {what} ({prefix}*){WANTED_FILE}")
    refuse_tensor_shapes(file, unet, config)
    states = {
        "unet": unet,
        "encoder": {k: t for k, t in vae.items() if not k.startswith((*_DECODER, "loss.", "model_ema."))},
        "decoder": {k: t for k, t in vae.items() if k.startswith(_DECODER)},
        "text_encoder": text_state(text),
    }
    fits = "Stable Diffusion 1.x" if config == SD15 else "the given configuration"
    parts = {name: Part(file, state, fits) for name, state in states.items()}
    return Source(config, parts, tokenizer=_tokenizer_for(file), origin=file)


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a text encoder's tensors transformers' present names; unused tensors are dropped."""
    unused = ("position_ids", "text_projection.weight")
    return {name.removeprefix("text_model."): t for name, t in state.items() if not name.endswith(unused)}


def _tokenizer_for(file: Path) -> Path:
    for folder in (file.parent, file.parent / "tokenizer"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    return resolve_input("data/clip_tokenizer")


def write_original(states: dict[str, dict[str, Tensor]], file: Path, dtype: torch.dtype | None) -> Path:
    """Write UNet, encoder, decoder and text encoder to one file in the original layout; return the file."""
    prefixes = {"unet": _UNET, "encoder": _VAE, "decoder": _VAE, "text_encoder": _TEXT + "text_model."}
    write_weights(
        {prefix + name: t for part, prefix in prefixes.items() for name, t in states[part].items()},
        file,
        dtype,
    )
    return file
