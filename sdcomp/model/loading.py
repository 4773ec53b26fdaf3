"""Loading and saving a model as a folder of safetensors with its configuration and tokenizer.

The folder holds `config.json`; `unet`, `vae`, `clip` (or `text_encoder`) and, where there is one,
`reader` as `.safetensors`; `vocab.json` and `merges.txt`. Nothing in it is executed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.config import ModelConfig
from sdcomp.model.stable_diffusion import StableDiffusion
from sdcomp.model.text import build_clip, build_text_encoder, load_tokenizer
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder


class ModelError(UserError):
    """A model cannot be loaded; the message says which file and what to do."""


def resolve_path(path: str | Path) -> Path:
    """A path as given, or, if relative and not there, the same from the repository's root."""
    path = Path(path).expanduser()
    from_root = Path(__file__).resolve().parents[2] / path
    return from_root if not path.exists() and from_root.exists() else path


def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """Load a model folder. `path` may be relative to the working directory or to the repository.

    Weights are converted to `dtype`. Raises ModelError, a ValueError, in one sentence when the folder or
    a file in it is missing, truncated or of another architecture.
    """
    folder = resolve_path(path)
    if not folder.exists():
        raise ModelError(f"model {str(path)!r} does not exist; give a model folder such as data/tiny")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a model configuration: {error}") from error

    def fill(module: nn.Module, name: str) -> nn.Module:
        load_weights(module, folder / f"{name}.safetensors")
        return module.eval().to(device=device, dtype=dtype)

    vae = nn.Module()
    vae.encoder, vae.decoder = VAEEncoder(config.vae), VAEDecoder(config.vae)
    load_parts([vae.encoder, vae.decoder], folder / "vae.safetensors")
    clip = fill(build_clip(config), "clip") if config.vision else None
    text_encoder = clip.text_model if clip else fill(build_text_encoder(config), "text_encoder")
    reader = None
    if config.reader:
        from sdcomp.scenes.reader import SceneReader

        reader = fill(SceneReader(), "reader").float()
    return StableDiffusion(
        config=config,
        unet=fill(UNet(config.unet), "unet"),
        encoder=vae.encoder.eval().to(device=device, dtype=dtype),
        decoder=vae.decoder.eval().to(device=device, dtype=dtype),
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(folder, config),
        clip=clip,
        reader=reader,
    )


def load_weights(module: nn.Module, file: Path) -> None:
    """Fill `module` from a safetensors file, strictly. Raises ModelError."""
    load_parts([module], file)


def load_parts(modules: list[nn.Module], file: Path) -> None:
    """Fill several modules from one safetensors file whose names do not overlap, strictly."""
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; copy the whole model folder") from None
    except SafetensorError as error:
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

    Each file is written beside its place and renamed, so a killed save leaves whole files only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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

    partial = file.with_suffix(".partial")
    save_file({name: convert(t) for name, t in state.items()}, partial)
    os.replace(partial, file)


def _write(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
