"""Loading and saving a model as a folder of safetensors with its configuration and tokenizer.

The folder holds `config.json`; `unet`, `vae`, `clip` (or `text_encoder`) and, where there is one,
`reader` as `.safetensors`; `vocab.json` and `merges.txt`. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdcomp.errors import UserError
from sdcomp.files import find, replacing
from sdcomp.model.config import ModelConfig
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.model.stable_diffusion import StableDiffusion
from sdcomp.model.text import build_clip, build_text_encoder, load_tokenizer
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.scenes.reader import SceneReader


class ModelError(UserError):
    """A model cannot be loaded; the message says which file and what to do."""


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """Load a model folder. `path` may be relative to the working directory or to the repository.

    Weights are converted to `dtype`. Raises ModelError, a ValueError, in one sentence when the folder or
    a file in it is missing, truncated or of another architecture.
    """
    folder = find(path)
    if not folder.exists():
        raise ModelError(f"model {str(path)!r} does not exist; give a model folder such as data/tiny")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is no table of settings")
        config = ModelConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a model configuration: {error}") from error

    def ready(name: str, module: nn.Module) -> nn.Module:
        # The reader only measures; convolutions run faster with channels last, on CPUs and on GPUs.
        kind = torch.float32 if name == "reader" else dtype
        return module.eval().to(device=device, dtype=kind, memory_format=torch.channels_last)

    parts = _build(config, folder / "config.json")
    tokenizer = _tokenizer(folder, config)
    load_weights([parts["unet"]], folder / "unet.safetensors")
    load_weights([parts["encoder"], parts["decoder"]], folder / "vae.safetensors")
    for name in ("clip", "text_encoder", "reader"):
        if name in parts:
            load_weights([parts[name]], folder / f"{name}.safetensors")
    parts = {name: ready(name, module) for name, module in parts.items()}
    if "clip" in parts:
        parts["text_encoder"] = parts["clip"].text_model
    return StableDiffusion(config=config, tokenizer=tokenizer, **parts)


def _build(config: ModelConfig, file: Path) -> dict[str, nn.Module]:
    """The parts of a model, with random weights. Raises ModelError for settings that do not go together."""
    try:
        NoiseSchedule(config.schedule)
        parts: dict[str, nn.Module] = {
            "unet": UNet(config.unet),
            "encoder": VAEEncoder(config.vae),
            "decoder": VAEDecoder(config.vae),
        }
        if config.vision:
            parts["clip"] = build_clip(config)
        else:
            parts["text_encoder"] = build_text_encoder(config)
    except Exception as error:  # PyTorch and transformers raise many kinds for a bad setting
        raise ModelError(f"no model can be built from {file}: {_one_line(error)}") from error
    if config.reader:
        parts["reader"] = SceneReader()
    return parts


def _tokenizer(folder: Path, config: ModelConfig) -> CLIPTokenizer:
    """As `load_tokenizer`, but raises ModelError."""
    try:
        return load_tokenizer(folder, config)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} is missing; copy the whole model folder") from None
    except Exception as error:  # tokenizers raises no narrower kind
        raise ModelError(f"vocab.json or merges.txt in {folder} is wrong: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_weights(modules: list[nn.Module], file: Path) -> None:
    """Fill modules, whose names do not overlap, from one safetensors file, strictly. Raises ModelError."""
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or no safetensors file ({error}); copy it again") from None
    wanted = {name: tensor for module in modules for name, tensor in module.state_dict().items()}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has the unknown", extra)
        raise ModelError(f"{file} does not fit config.json: it {kind} {', '.join(names[:3])}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"{file} does not fit config.json: {name} is {tuple(state[name].shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    for module in modules:
        module.load_state_dict({name: state[name] for name in module.state_dict()})


def save(sd: StableDiffusion, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a model folder that `load` reads, its weights converted to `dtype` if given.

    Each file is written beside its place and renamed, so a killed save leaves whole files only. Raises
    UserError for a file that cannot be written, and for a text encoder that is not the CLIP's own.
    """
    if sd.clip is not None and sd.text_encoder is not sd.clip.text_model:
        raise ModelError(
            "the text encoder was replaced, but clip was not: replace(clip=...) as well to save both"
        )
    folder = Path(folder)
    parts = {
        "unet": sd.unet.state_dict(),
        "vae": {**sd.encoder.state_dict(), **sd.decoder.state_dict()},
    }
    if sd.clip is not None:
        parts["clip"] = sd.clip.state_dict()
    else:
        parts["text_encoder"] = sd.text_encoder.state_dict()
    if sd.reader is not None:
        parts["reader"] = sd.reader.state_dict()
    for name, state in parts.items():
        _save_state(state, folder / f"{name}.safetensors", dtype)
    vocab = sorted(sd.tokenizer.get_vocab().items(), key=lambda item: item[1])
    _write(folder / "vocab.json", json.dumps(dict(vocab), ensure_ascii=False))
    merges = "".join(f"{' '.join(pair)}\n" for pair in sd.tokenizer._merges)
    _write(folder / "merges.txt", "#version: 0.2\n" + merges)
    _write(folder / "config.json", json.dumps(sd.config.to_dict(), indent=2) + "\n")
    return folder


def _save_state(state: dict[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    with replacing(file) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file({name: convert(t) for name, t in state.items()}, partial)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        partial.chmod(mode)  # safetensors makes files that only their owner can read


def _write(file: Path, text: str) -> None:
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def weights_digest(*modules: nn.Module) -> str:
    """A short name for the very weights and buffers of some modules (12 hexadecimal digits of SHA-256)."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:12]
