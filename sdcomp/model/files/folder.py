"""Read and write a model in our own format: a folder of safetensors, configuration and tokenizer.

The folder holds `config.json`; `unet`, `vae`, `clip` (or `text_encoder`) and maybe `reader` as
`.safetensors`; `vocab.json` and `merges.txt`; and `unet_channels.json` for a UNet that lost channels.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sdcomp.files import write_text
from sdcomp.model.config import ModelConfig
from sdcomp.model.files.replacement import replacing_model
from sdcomp.model.files.tensors import Part, Source, read_json, read_tensors, write_weights
from sdcomp.model.tokenizer import save_tokenizer

_DECODER = ("decoder.", "post_quant_conv.")


def read_folder(folder: Path, needs_unet: bool = True) -> Source:
    """Read the parts of a folder. Raises ModelError for a file that is missing or wrong."""
    origin, removed = folder / "config.json", folder / "unet_channels.json"
    config = read_json(origin, ModelConfig.from_dict, "is not a model configuration")
    # A broken link counts as a file that is there: reading it raises an error.
    there = os.path.lexists(removed)
    channels = read_json(removed, dict, "is no record of a UNet's channels") if there else {}
    names = [
        *(["unet"] if needs_unet else []),
        "vae",
        "clip" if config.vision else "text_encoder",
        *(["reader"] if config.reader else []),
    ]
    files = {name: folder / f"{name}.safetensors" for name in names}
    states = {name: read_tensors(file) for name, file in files.items()}
    vae = states.pop("vae")
    parts = {name: Part(files[name], state) for name, state in states.items()}
    # The encoder gets all tensors but the decoder's, so that `check` finds unknown ones.
    parts["encoder"] = Part(files["vae"], {k: t for k, t in vae.items() if not k.startswith(_DECODER)})
    parts["decoder"] = Part(files["vae"], {k: t for k, t in vae.items() if k.startswith(_DECODER)})
    return Source(config, parts, tokenizer=folder, origin=origin, channels=channels, removed=removed)


def write_folder(
    config: ModelConfig,
    states: dict[str, dict[str, Tensor]],
    channels: dict[str, list[int]],
    tokenizer: CLIPTokenizer,
    folder: Path,
    dtype: torch.dtype | None,
) -> Path:
    """Write the folder, see `replacing_model`. Raises UserError for a file that cannot be written."""
    others = {name: state for name, state in states.items() if name not in ("encoder", "decoder")}
    with replacing_model(folder):
        for name, state in {**others, "vae": {**states["encoder"], **states["decoder"]}}.items():
            write_weights(state, folder / f"{name}.safetensors", dtype)
        save_tokenizer(tokenizer, folder)
        if channels:
            write_text(folder / "unet_channels.json", json.dumps(channels) + "\n")
        write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    return folder
