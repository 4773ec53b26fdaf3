"""Files of weights: read them as mapped tensors without executing anything, check, fill modules, write."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.files import regular, write_tensors
from sdcomp.model.config import ModelConfig
from sdcomp.settings import shown

MOST_TEXT = 16 * 2**20
"""The most bytes of a JSON or text file. The largest real one, a vocabulary, has one million."""
_HEADER = 16 * 2**20
"""The most bytes of a safetensors file's header. Stable Diffusion 1.5 has 130,000."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModelError(UserError):
    """A model cannot be loaded or saved; the message says which file and what to do."""


@dataclass
class Part:
    """The tensors of one module under its own names, their file, and what they should fit."""

    file: Path
    state: dict[str, Tensor]
    fits: str = "config.json"


@dataclass
class Source:
    """The content of a model's files: its configuration, its parts, and its tokenizer's folder.

    The parts are `unet`, `encoder`, `decoder`, `text_encoder` or `clip`, and maybe `reader`. `origin` is
    the file or folder of the configuration. `channels` is the channel map of a UNet that lost channels, and
    `removed` the file of that map.
    """

    config: ModelConfig
    parts: dict[str, Part]
    tokenizer: Path
    origin: Path
    channels: dict[str, list[int]] = field(default_factory=dict)
    removed: Path | None = None


class _Inert:
    """Replaces `ModelCheckpoint`, which the published checkpoint names but does not need."""


_STAND_INS = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or PyTorch file by name, mapped from the file if its format allows.

    The content tells the format, not the file's name. From a pickle, only tensors and plain containers are
    rebuilt. Raises ModelError for a file that is damaged, of another format, or needs other code.
    """
    try:
        with open(regular(file, ModelError), "rb") as opened:
            head = opened.read(512)
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
    return read_safetensors(file, ModelError)


def read_safetensors(file: Path, error: type[UserError]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file by name, mapped from it; raises `error` for any other file."""
    try:
        with open(regular(file, error), "rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > _HEADER:
            raise ValueError(f"a header of {header} bytes")
        return load_file(file)
    except UserError:
        raise
    except Exception as reason:  # of many kinds, for example for a dtype that this PyTorch does not have
        raise error(f"{file} is damaged or no safetensors file ({one_line(reason)}); copy it again") from None


def _read_pickle(file: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        if mapped:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if not any(entry.filename.endswith("data.pkl") for entry in entries):
                raise ModelError(f"{file} is a zip archive without a PyTorch checkpoint; unpack it first")
            # PyTorch never compresses, and a compressed entry may unpack to more than the memory holds.
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
    except Exception as error:  # of many kinds, from PyTorch and zipfile
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


def read_json(
    file: Path,
    convert: Callable[[dict[str, Any]], Any],
    wrong: str,
    error: type[UserError] = ModelError,
) -> Any:
    """Read the table of a JSON file and convert it. Raises `error` with the words `wrong` if that fails."""
    regular(file, error, MOST_TEXT)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it is no table of settings")
        return convert(values)
    except KeyError as reason:
        raise error(f"{file} {wrong}: it has no {shown(reason.args[0])}") from None
    except Exception as reason:  # of many kinds, since `convert` meets values of any type
        raise error(f"{file} {wrong}: {one_line(reason)}") from reason


def check(module: nn.Module, part: Part) -> None:
    """Raise ModelError unless the part's tensors have the names, shapes and types of the module's.

    The weight of a linear layer is accepted for a 1x1 convolution, and gets its shape: other formats store
    these convolutions as linear layers.
    """
    wanted, state = module.state_dict(), part.state
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has the unknown", extra)
        raise ModelError(f"{part.file} does not fit {part.fits}: it {kind} {listed(names)}")
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
        floating = tensor.is_floating_point()
        if found.dtype not in (_FLOATS if floating else (tensor.dtype,)):
            fitting = "fp16, bf16 or fp32" if floating else _short(tensor.dtype)
            raise ModelError(f"{part.file} holds {name} as {_short(found.dtype)}; give weights in {fitting}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fill(module: nn.Module, part: Part, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a module on the meta device its weights, in `dtype` on `device`; this empties the part.

    Weights that need no conversion stay mapped, and are not read. Raises ModelError for weights that do not
    fit, and for weights that are infinite or NaN after a conversion.
    """
    check(module, part)
    filled = {}
    for name, wanted in module.state_dict().items():
        tensor = part.state.pop(name)
        kind = dtype if wanted.is_floating_point() else wanted.dtype
        filled[name] = tensor.to(device=device, dtype=kind)
        # Mapped weights are not checked, since reading them takes long; `generate` checks its results.
        if kind.is_floating_point and kind != tensor.dtype and not finite(filled[name]):
            raise ModelError(
                f"{part.file}: {name} has values that are infinite or NaN in {kind}; "
                "copy the file again, or load it in a wider type such as torch.float32"
            )
    module.load_state_dict(filled, assign=True)
    for owner in module.modules():
        if getattr(owner, "position_ids", None) is not None:  # CLIP's: not in the state dict, so still meta
            n = owner.position_ids.shape[-1]
            owner.position_ids = torch.arange(n, device=device).expand((1, -1))


def check_float_type(dtype: object) -> None:
    """Raise TypeError for a `dtype` that `fill` does not take; None stands for each tensor's own."""
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(
            f"dtype must be a floating-point type of 16, 32 or 64 bits such as torch.float16, not {dtype!r}"
        )


def write_weights(state: dict[str, Tensor], file: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file; floating-point tensors are converted to `dtype` if it is given.

    Raises UserError if the file cannot be written and for values that `dtype` cannot hold, TypeError for a
    `dtype` that cannot be loaded.
    """
    check_float_type(dtype)

    def convert(name: str, tensor: Tensor) -> Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor
        made = tensor.detach().to("cpu", dtype)
        if not finite(made) and finite(tensor):
            raise UserError(f"{name} has values that {dtype} cannot hold: save in a wider type")
        return made

    write_tensors(file, {name: convert(name, t) for name, t in state.items()}, {"format": "pt"})


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    # A sum takes a tenth of the time of `isfinite`, but it can overflow although all values are finite.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def listed(names: Sequence[str]) -> str:
    """The first three of some names from a file, as text for a sentence."""
    return ", ".join(one_line(name)[:100] for name in names[:3])


def one_line(error: Exception | str) -> str:
    """The text of an error on one line: at most 300 characters, all of them printable."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:300] or type(error).__name__
