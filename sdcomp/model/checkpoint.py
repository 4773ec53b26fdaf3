"""Files of weights: read as mapped tensors without executing anything, checked, given to modules, written."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.files import replacing
from sdcomp.model.config import ModelConfig

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModelError(UserError):
    """A model cannot be loaded or saved; the message says which file and what to do."""


@dataclass
class Part:
    """The tensors of one module under its own names, the file they come from and what they should fit."""

    file: Path
    state: dict[str, Tensor]
    fits: str = "config.json"


@dataclass
class Source:
    """What the files of a model hold: its configuration, its parts, and where its tokenizer is.

    The parts are `unet`, `encoder`, `decoder`, `text_encoder` or `clip`, and `reader` where there is one.
    `origin` is where the configuration comes from; `channels` what was kept of a UNet that lost channels.
    """

    config: ModelConfig
    parts: dict[str, Part]
    tokenizer: Path
    origin: Path
    channels: dict[str, list[int]] = field(default_factory=dict)


class _Inert:
    """Stands for `ModelCheckpoint`, which the published checkpoint names but does not need."""


_STAND_INS = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file by name, mapped from the file where its format allows.

    What the file is, is told by its content. Of a pickle only tensors and plain containers are rebuilt.
    Raises ModelError in one sentence for a file that is something else, damaged, or asks for more.
    """
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; copy the whole model folder") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror or error})") from None
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{file} is a Git LFS pointer, not weights; run `git lfs pull` there, or download the file itself"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(
            f"{file} is a damaged download: a web page, not weights; download it again, signed in if need be"
        )
    if head.startswith(b"GGUF"):
        raise ModelError(f"{file} is a GGUF file of quantized weights; give .safetensors or .ckpt weights")
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:9] != b"{":
        return _read_pickle(file, mapped=head.startswith(b"PK"))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged or no safetensors file ({one_line(error)}); copy it again"
        ) from None


def _read_pickle(file: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        if mapped:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if not any(entry.filename.endswith("data.pkl") for entry in entries):
                raise ModelError(f"{file} is a zip archive without a PyTorch checkpoint; unpack it first")
            # PyTorch never compresses; what does may unpack to more than any memory holds.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ModelError(
                    f"{file} is a compressed archive, which PyTorch does not write; unpack it first"
                )
        with torch.serialization.safe_globals(_STAND_INS):
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+) (?:was not|whose)", str(error))
        if not named:
            raise ModelError(f"{file} is damaged or no checkpoint; download it again") from None
        raise ModelError(
            f"{file} refers to {named[1]}, which could run code, and is refused; "
            "get the model as .safetensors from a source that you trust"
        ) from None
    except ModelError:
        raise
    except Exception as error:  # PyTorch and zipfile raise many kinds for a broken file
        raise ModelError(
            f"{file} is damaged or truncated ({one_line(error)[:120]}); download it again"
        ) from None
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    items = held.items() if isinstance(held, dict) else ()
    tensors = {name: t for name, t in items if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        raise ModelError(f"{file} holds no weights by name; give a checkpoint of Stable Diffusion 1.x")
    return tensors


def read_json(file: Path, convert: Callable[[dict[str, Any]], Any], wrong: str) -> Any:
    """The table in a JSON file, converted. Raises ModelError, `wrong` saying what the file is not."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is no table of settings")
        return convert(values)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; copy the whole model folder") from None
    except KeyError as error:
        raise ModelError(f"{file} {wrong}: it has no {error.args[0]!r}") from None
    except Exception as error:  # whatever a setting of another kind leads to
        raise ModelError(f"{file} {wrong}: {one_line(error)}") from error


def check(module: nn.Module, part: Part) -> None:
    """Raise ModelError unless the part's tensors are the module's in name, shape and kind.

    A linear layer's weight passes for that of a 1x1 convolution, which it is in other layouts.
    """
    wanted, state = module.state_dict(), part.state
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has the unknown", extra)
        raise ModelError(f"{part.file} does not fit {part.fits}: it {kind} {', '.join(names[:3])}")
    for name, tensor in wanted.items():
        found = state[name]
        if found.layout != torch.strided or found.is_meta:
            raise ModelError(f"{part.file} does not fit {part.fits}: {name} is no dense tensor with values")
        if found.shape != tensor.shape:
            if (*found.shape, 1, 1) != tensor.shape:
                raise ModelError(
                    f"{part.file} does not fit {part.fits}: {name} is {tuple(found.shape)}, "
                    f"not {tuple(tensor.shape)}"
                )
            state[name] = found[..., None, None]
        if tensor.is_floating_point() and found.dtype not in _FLOATS:
            raise ModelError(
                f"{part.file} holds {name} as {str(found.dtype).removeprefix('torch.')}; "
                "give weights in fp16, bf16 or fp32"
            )


def fill(module: nn.Module, part: Part, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a module on the meta device its weights, in `dtype` on `device`; empties the part as it goes.

    Weights that need no conversion stay mapped. Raises ModelError for those that do not fit.
    """
    check(module, part)
    filled = {}
    for name, wanted in module.state_dict().items():
        tensor = part.state.pop(name)
        kind = dtype if wanted.is_floating_point() else wanted.dtype
        filled[name] = tensor.to(device=device, dtype=kind)
    module.load_state_dict(filled, assign=True)
    for owner in module.modules():
        if getattr(owner, "position_ids", None) is not None:  # CLIP's, in no state dict and so still meta
            n = owner.position_ids.shape[-1]
            owner.position_ids = torch.arange(n, device=device).expand((1, -1))


def write_tensors(state: dict[str, Tensor], file: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, its floating-point tensors converted to `dtype` if given.

    Raises UserError when it cannot be written.
    """

    def convert(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", kind).contiguous()

    with replacing(file) as partial:
        save_file({name: convert(t) for name, t in state.items()}, partial, metadata={"format": "pt"})


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
