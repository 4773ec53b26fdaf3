"""Load and save a model in every format: our folder, a single file, a diffusers folder, a hub name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdcomp.files import regular, resolve_input
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.model.clip import build_clip, build_text_encoder
from sdcomp.model.config import SD15, ModelConfig
from sdcomp.model.device import check_device
from sdcomp.model.files.diffusers_folder import read_diffusers, write_diffusers
from sdcomp.model.files.folder import read_folder, write_folder
from sdcomp.model.files.hub import local_model
from sdcomp.model.files.lora import merge_loras
from sdcomp.model.files.single_file import read_original, text_state, write_original
from sdcomp.model.files.tensors import (
    MOST_TEXT,
    ModelError,
    Part,
    Source,
    check,
    check_float_type,
    fill,
    one_line,
)
from sdcomp.model.kinds import require_model
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.model.tokenizer import load_tokenizer
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.scenes.reader import SceneReader


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    tokenizer: str | Path | CLIPTokenizer | None = None,
    config: ModelConfig = SD15,
    variant: str | None = None,
    unet: nn.Module | None = None,
    loras: Mapping[str | Path, float] | None = None,
) -> StableDiffusion:
    """Load a model: a folder of ours or of diffusers, a `.safetensors` or `.ckpt` file, or a hub name.

    - `path` is relative to the working directory or to the repository. If there is no such path, a name
      `owner/model` is fetched from the Hugging Face hub, only the files that are needed.
    - `dtype`: weights are converted to it; None keeps the stored type of the UNet, or of the VAE if `unet`
      is given. Weights that need no conversion are mapped from the file, not copied.
    - `tokenizer`, a folder or a `CLIPTokenizer`, replaces the model's own. A single file has the tokenizer
      beside it, else `data/clip_tokenizer`.
    - `config` gives the sizes of a single file; its tensors must fit them.
    - `variant` chooses among the weights of a diffusers folder, e.g. "fp16".
    - `unet` replaces the UNet of the files; a folder of ours then needs none.
    - `loras` maps LoRA files to the scales at which they are merged, see `sdcomp.model.files.lora`.

    Raises ModelError, a ValueError, for anything missing, damaged, unsafe or of another architecture,
    UserError for a `device` that this machine does not have, and TypeError for another kind of `dtype`.
    """
    device = check_device(device)
    check_float_type(dtype)
    if loras and unet is not None:
        raise ModelError("LoRA files change the weights of a model's own UNet: leave loras or unet out")
    source = _open(path, config, variant, needs_unet=unet is None)
    modules = _build(source.config, source.origin, source.channels, source.removed)
    if unet is not None:
        source.parts.pop("unet", None)
        modules["unet"] = unet
    if not isinstance(tokenizer, CLIPTokenizer):
        tokenizer = _tokenizer(
            source.tokenizer if tokenizer is None else resolve_input(tokenizer), source.config
        )
    elif len(tokenizer) != (size := source.config.text["vocab_size"]):
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, but the text encoder knows {size}")
    if dtype is None:
        dtype = _stored_type(source.parts["unet" if unet is None else "decoder"])
    for name, part in source.parts.items():
        # The reader only judges images, so it always computes in float32.
        fill(modules[name], part, device=device, dtype=torch.float32 if name == "reader" else dtype)
        modules[name].eval()
    if "clip" in modules:
        modules["text_encoder"] = modules["clip"].text_model
    if loras:
        merge_loras(loras, modules["unet"], modules["text_encoder"])
    return StableDiffusion(config=source.config, tokenizer=tokenizer, **modules)


def _stored_type(part: Part) -> torch.dtype:
    """The type of a part's first floating-point tensor."""
    return next((t.dtype for t in part.state.values() if t.is_floating_point()), torch.float32)


def load_from_standard_weights(
    path: str | Path, *, config: ModelConfig = SD15, variant: str | None = None
) -> dict[str, dict[str, Tensor]]:
    """Load the state dicts of a model's parts, in their stored types, under the names of our modules.

    The keys are "clip" (for a `CLIPTextModel`), "encoder" (`VAEEncoder`), "decoder" (`VAEDecoder`) and
    "diffusion" (`UNet`); each state dict loads strictly. Arguments and errors are those of `load`.
    """
    source = _open(path, config, variant)
    modules = _build(source.config, source.origin, source.channels, source.removed)
    for name, part in source.parts.items():
        check(modules[name], part)
    states = {name: part.state for name, part in source.parts.items()}
    if "clip" in states:
        prefix = "text_model."
        states["text_encoder"] = text_state({k: t for k, t in states["clip"].items() if k.startswith(prefix)})
    names = {"clip": "text_encoder", "encoder": "encoder", "decoder": "decoder", "diffusion": "unet"}
    return {name: states[part] for name, part in names.items()}


def _open(path: str | Path, config: ModelConfig, variant: str | None, needs_unet: bool = True) -> Source:
    """Read the model with this path or name, in any format."""
    found = local_model(path, variant)
    if not found.is_dir():
        return read_original(found, config)
    # lexists: for a file that is there but cannot be read, the reader raises an error with its name.
    if os.path.lexists(found / "model_index.json"):
        return read_diffusers(found, variant)
    if os.path.lexists(found / "config.json"):
        return read_folder(found, needs_unet)
    raise ModelError(
        f"{found} is not a model folder: it has no config.json and no model_index.json; where a save was"
        " stopped, save again"
    )


def _build(
    config: ModelConfig, origin: Path, channels: dict[str, list[int]], removed: Path | None = None
) -> dict[str, nn.Module]:
    """Build the parts of a model on the meta device.

    `origin` and `removed` are the files of the configuration and of the channel map, for error messages.
    Raises ModelError for settings that do not fit together.
    """
    try:
        with torch.device("meta"):
            parts: dict[str, nn.Module] = {
                "unet": UNet(config.unet),
                "encoder": VAEEncoder(config.vae),
                "decoder": VAEDecoder(config.vae),
            }
            if config.vision:
                parts["clip"] = build_clip(config)
            else:
                parts["text_encoder"] = build_text_encoder(config)
            if config.reader:
                parts["reader"] = SceneReader()
    except Exception as error:  # of many kinds, from PyTorch and transformers
        raise ModelError(f"no model can be built from {origin}: {one_line(error)}") from error
    try:
        apply_channel_map(parts["unet"], channels)
    except ValueError as error:
        raise ModelError(f"{removed or origin} does not fit the UNet: {one_line(error)}") from error
    return parts


def _tokenizer(folder: Path, config: ModelConfig) -> CLIPTokenizer:
    """Load a tokenizer; raises ModelError, also for token ids that the text encoder does not have."""
    wrong = f"the tokenizer (vocab.json and merges.txt, or tokenizer.json) in {folder} is wrong"
    size = config.text["vocab_size"]
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        if os.path.lexists(folder / name):
            regular(folder / name, ModelError, MOST_TEXT)
    try:
        tokenizer = load_tokenizer(folder, config)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} is missing; copy the whole model folder") from None
    except Exception as error:  # tokenizers raises no narrower class
        raise ModelError(f"{wrong}: {one_line(error)}") from error
    if set(tokenizer.get_vocab().values()) != set(range(size)):
        raise ModelError(f"{wrong}: its tokens must have the ids 0 to {size - 1}, each once")
    return tokenizer


def save(
    sd: StableDiffusion,
    path: str | Path,
    dtype: torch.dtype | None = None,
    format: str | None = None,
) -> Path:
    """Write a model so that `load` can read it; return the path. `dtype` converts the written weights.

    `format` is one of

    - "sdcomp", the default: our folder, with all parts and the channel map of the UNet. If the UNet is
      None, the folder has none;
    - "original", the default for a path that ends in `.safetensors`: one file in the layout of SD 1.x's
      checkpoints, without tokenizer, image encoder and reader;
    - "diffusers": a folder for `StableDiffusionPipeline.from_pretrained`, without image encoder and reader.

    All files are written to temporary places and then renamed. So a killed save leaves the model that was
    there before, or in its last moment a folder that `load` refuses. Raises UserError for a file that cannot
    be written, ModelError for a model that the format cannot hold, and TypeError for a `dtype` that `load`
    does not take and for a UNet alone.
    """
    require_model(sd)
    path = Path(path)
    format = _format(path, format)
    # The configuration must not promise parts that this model does not have.
    config = dataclasses.replace(
        sd.config, vision=sd.config.vision if sd.clip is not None else None, reader=sd.reader is not None
    )
    if sd.unet is None and format != "sdcomp":
        raise ModelError(f"the {format} format needs a UNet, and this model has none")
    names = ("encoder", "decoder") if sd.unet is None else ("unet", "encoder", "decoder")
    states = {name: getattr(sd, name).state_dict() for name in names}
    if format == "sdcomp" and sd.clip is not None:
        if sd.text_encoder is not sd.clip.text_model:
            raise ModelError(
                "the text encoder was replaced, but clip was not: replace(clip=...) as well to save both"
            )
        states["clip"] = sd.clip.state_dict()
    else:
        config = dataclasses.replace(config, vision=None)
        states["text_encoder"] = sd.text_encoder.state_dict()
    if format == "sdcomp" and sd.reader is not None:
        states["reader"] = sd.reader.state_dict()
    channels = {} if sd.unet is None else channel_map(sd.unet)
    if channels and format != "sdcomp":
        raise ModelError(
            f"the UNet has lost channels, which the {format} format cannot say; save it as a folder"
        )
    modules = _build(config, path, channels)
    for name, state in states.items():
        # A wrapped module, for example a quantized one, does not fit here; `sdcomp.save` handles it.
        check(modules[name], Part(Path(f"the model's {name}"), dict(state), "its configuration"))
    if format == "original":
        return write_original(states, path, dtype)
    if format == "diffusers":
        return write_diffusers(config, states, sd.tokenizer, path, dtype)
    return write_folder(config, states, channels, sd.tokenizer, path, dtype)


def _format(path: Path, format: str | None) -> str:
    """The format to save in; the default depends on the path. Raises ModelError if the two do not fit."""
    if format is None:
        format = "original" if path.suffix == ".safetensors" else "sdcomp"
    if format not in ("sdcomp", "original", "diffusers"):
        raise ValueError(f"format must be 'sdcomp', 'original' or 'diffusers', not {format!r}")
    single = path.suffix == ".safetensors"
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth") or (format == "original") != single:
        raise ModelError(f"{path}: give a name ending in .safetensors for a single file, or else a folder")
    return format


def weights_digest(*modules: nn.Module) -> str:
    """A short hash of all weights and buffers of some modules: 12 hexadecimal digits of their SHA-256."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:12]
