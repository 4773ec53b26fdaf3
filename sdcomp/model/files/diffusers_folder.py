"""Read and write a model as a folder of diffusers' `StableDiffusionPipeline`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sdcomp.errors import UserError
from sdcomp.files import write_text
from sdcomp.model.config import ModelConfig
from sdcomp.model.files.diffusers_config import (
    latent_size,
    schedule_config,
    schedule_settings,
    text_config,
    text_settings,
    unet_config,
    unet_settings,
    vae_config,
    vae_settings,
)
from sdcomp.model.files.names import modern_vae_name, unet_name, vae_name
from sdcomp.model.files.replacement import replacing_model
from sdcomp.model.files.single_file import text_state
from sdcomp.model.files.tensors import (
    ModelError,
    Part,
    Source,
    read_json,
    read_tensors,
    write_weights,
)
from sdcomp.model.files.unsupported import refuse_pipeline
from sdcomp.model.tokenizer import save_tokenizer
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def hub_files(variant: str | None) -> list[str]:
    """The files that are fetched from a model on the hub; weights only as safetensors."""
    end = f".{variant}.safetensors" if variant else ".safetensors"
    return ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/merges.txt"] + [
        f"{part}/{name}" for part, stem in _WEIGHTS.items() for name in ("config.json", stem + end)
    ]


def read_diffusers(folder: Path, variant: str | None = None) -> Source:
    """Read the parts of a diffusers folder. Raises ModelError if it is incomplete or holds another model."""
    wrong = "does not describe a model that can be loaded"
    index = read_json(folder / "model_index.json", dict, wrong)
    refuse_pipeline(folder, index)
    unet, side = read_json(
        folder / "unet" / "config.json", lambda values: (unet_config(values), latent_size(values)), wrong
    )
    vae = read_json(folder / "vae" / "config.json", vae_config, wrong)
    schedule = read_json(folder / "scheduler" / "scheduler_config.json", schedule_config, wrong)
    text = read_json(folder / "text_encoder" / "config.json", text_config, wrong)
    try:
        config = ModelConfig(
            unet=unet, vae=vae, schedule=schedule, text=text, image_size=side * vae.downsampling
        )
    except UserError as error:
        raise ModelError(f"the files config.json of the parts in {folder} do not agree: {error}") from None

    files = {part: _weights_file(folder, part, variant) for part in _WEIGHTS}
    if variant and not any(f".{variant}." in file.name for file in files.values()):
        raise ModelError(f"{folder} has no weights of the variant {variant!r}; leave variant out")
    states = {part: read_tensors(file) for part, file in files.items()}
    states["vae"] = {modern_vae_name(name): t for name, t in states["vae"].items()}
    with torch.device("meta"):
        ours = {unet_name(name, unet): name for name in UNet(unet).state_dict()}
        decoder = {vae_name(name, vae): name for name in VAEDecoder(vae).state_dict()}
        encoder = {vae_name(name, vae): name for name in VAEEncoder(vae).state_dict()}
    parts = {
        "unet": Part(files["unet"], _renamed(states["unet"], ours), "unet/config.json"),
        # The encoder gets all tensors but the decoder's, so that `check` finds unknown ones.
        "encoder": Part(files["vae"], _renamed(states["vae"], encoder, besides=decoder), "vae/config.json"),
        "decoder": Part(
            files["vae"], _renamed(states["vae"], decoder, besides=states["vae"]), "vae/config.json"
        ),
        "text_encoder": Part(
            files["text_encoder"], text_state(states["text_encoder"]), "text_encoder/config.json"
        ),
    }
    return Source(config, parts, tokenizer=folder / "tokenizer", origin=folder)


def _renamed(
    state: dict[str, Tensor], names: dict[str, str], besides: Collection[str] = ()
) -> dict[str, Tensor]:
    """Rename the tensors by `names`; one without a new name keeps its own, or is dropped if in `besides`."""
    return {names.get(name, name): t for name, t in state.items() if name in names or name not in besides}


def _weights_file(folder: Path, part: str, variant: str | None) -> Path:
    stem = _WEIGHTS[part]
    pickled = "pytorch_model" if stem == "model" else stem
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{pickled}.bin", f"{pickled}.fp16.bin"]
    if variant:
        # A part without the variant has its plain weights, as in diffusers.
        names = [f"{stem}.{variant}.safetensors", f"{pickled}.{variant}.bin", names[0], names[2]]
    for name in names:
        if os.path.lexists(folder / part / name):
            return folder / part / name
    if any((folder / part).glob("*.index*.json")):
        raise ModelError(f"{folder / part} is in shards: save it with one file, by a larger max_shard_size")
    raise ModelError(f"{folder / part / names[0]} is missing; copy the whole model folder")


def write_diffusers(
    config: ModelConfig,
    states: dict[str, dict[str, Tensor]],
    tokenizer: CLIPTokenizer,
    folder: Path,
    dtype: torch.dtype | None,
) -> Path:
    """Write a folder for `StableDiffusionPipeline.from_pretrained`, see `replacing_model`."""
    unet = {unet_name(name, config.unet): t for name, t in states["unet"].items()}
    vae = {
        vae_name(name, config.vae): t for part in ("encoder", "decoder") for name, t in states[part].items()
    }
    # diffusers has linear layers where we have 1x1 convolutions.
    vae = {name: t.flatten(1) if ".attentions." in name and t.dim() == 4 else t for name, t in vae.items()}
    text = {f"text_model.{name}": t for name, t in states["text_encoder"].items()}
    side = config.image_size // config.vae.downsampling
    settings = {
        "unet/config": {"_class_name": "UNet2DConditionModel"} | unet_settings(config.unet, side),
        "vae/config": {"_class_name": "AutoencoderKL"} | vae_settings(config.vae, config.image_size),
        "text_encoder/config": text_settings(config),
        "scheduler/scheduler_config": schedule_settings(config.schedule),
        "tokenizer/tokenizer_config": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.text["max_position_embeddings"],
        }
        | _special_tokens(tokenizer),
        "tokenizer/special_tokens_map": _special_tokens(tokenizer),
        "model_index": {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    }
    with replacing_model(folder):
        for part, state in (("unet", unet), ("vae", vae), ("text_encoder", text)):
            write_weights(state, folder / part / f"{_WEIGHTS[part]}.safetensors", dtype)
        save_tokenizer(tokenizer, folder / "tokenizer")
        for name, values in settings.items():
            write_text(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")
    return folder


def _special_tokens(tokenizer: CLIPTokenizer) -> dict[str, str]:
    return {k: str(getattr(tokenizer, k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
