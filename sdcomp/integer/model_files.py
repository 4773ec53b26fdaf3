"""What the files of int8 and of packed models have in common: JSON of settings beside safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sdcomp.files import resolve_input, write_tensors, write_text
from sdcomp.integer.execution import DTYPES
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.model.config import UNetConfig, from_dict
from sdcomp.model.files.tensors import finite, listed, read_json, read_safetensors
from sdcomp.model.unet import UNet
from sdcomp.quantization.quantization_files import (
    TIMESTEP_ARG,
    TRAIN_TIMESTEPS,
    QuantizationFileError,
    starts_rule,
)
from sdcomp.settings import ANYTHING, AnyOf, OneOf, Rule, TableOf, Whole, check_settings, within

COMMON: dict[str, Rule] = {
    "dtype": OneOf(*(str(dtype).removeprefix("torch.") for dtype in DTYPES)),
    "starts": ANYTHING,  # its rule depends on train_timesteps
    "train_timesteps": TRAIN_TIMESTEPS,
    "timestep_arg": AnyOf(OneOf(None), TIMESTEP_ARG),
    "splits": TableOf(Whole(1, 2**31)),
}
"""What the settings of both kinds must be."""

Parsed = TypeVar("Parsed")


class Format(NamedTuple):
    """A kind of model, "int8" or "packed", and the names of its files."""

    kind: str
    config: str
    tensors: str


def write_files(
    folder: str | Path,
    format: Format,
    module: nn.Module,
    settings: Mapping[str, object],
    state: Mapping[str, Tensor],
    indent: int,
) -> Path:
    """Write settings and tensors into a folder; returns it. The settings also tell how to build our UNet."""
    folder, settings = Path(folder).expanduser(), dict(settings)
    if isinstance(module, UNet):
        settings["unet"] = dataclasses.asdict(module.config)
        settings["channels"] = channel_map(module)
    write_tensors(folder / format.tensors, state)
    write_text(folder / format.config, json.dumps(settings, indent=indent) + "\n")
    return folder


def read_files(
    folder: str | Path,
    format: Format,
    module: nn.Module | UNetConfig | None,
    parse: Callable[[dict[str, object]], Parsed],
) -> tuple[Parsed, nn.Module, dict[str, Tensor]]:
    """Read what `write_files` wrote: what `parse` makes of the settings, the module, and the tensors.

    The module is the given one, or our UNet on the meta device, by the given configuration or that of the
    file. `parse` raises UserError for wrong settings. Raises QuantizationFileError for a file that is missing
    or damaged, and where nothing says what the module is.
    """
    folder = resolve_input(folder)
    for file in (format.config, format.tensors):
        if not os.path.lexists(folder / file):
            raise QuantizationFileError(f"{folder} is no saved {format.kind} model: it has no {file}")

    def build(settings: dict[str, object]) -> tuple[Parsed, nn.Module | None]:
        config, channels = settings.pop("unet", None), settings.pop("channels", {})
        return parse(settings), _module(module, config, channels)

    file = folder / format.config
    parsed, module = read_json(file, build, "is damaged", QuantizationFileError)
    if module is None:
        raise QuantizationFileError(f"{file} does not say what the module is: give one to load_{format.kind}")
    return parsed, module, read_safetensors(folder / format.tensors, QuantizationFileError)


def _module(
    module: nn.Module | UNetConfig | None, config: object, channels: dict[str, list[int]]
) -> nn.Module | None:
    if module is None and config is not None:
        with within("unet"):
            module = from_dict(UNetConfig, config)
    if isinstance(module, UNetConfig):
        with torch.device("meta"):
            return apply_channel_map(UNet(module), channels)
    return module


def check_common(settings: Mapping[str, object], rules: Mapping[str, Rule]) -> None:
    """Check settings by `rules`, which include `COMMON`, and the starts of the intervals by theirs."""
    check_settings(settings, rules)
    check_settings({"starts": settings["starts"]}, {"starts": starts_rule(settings["train_timesteps"])})


def differing(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]
) -> list[str]:
    """Return the names of tensors that are missing, too many, or of another shape or type than wanted.

    Floating-point tensors may have any of the types `dtypes`.
    """
    names = list(found.keys() ^ wanted.keys())
    for name in found.keys() & wanted.keys():
        allowed = dtypes if wanted[name].is_floating_point() else (wanted[name].dtype,)
        if found[name].shape != wanted[name].shape or found[name].dtype not in allowed:
            names.append(name)
    return names


def are_codes(values: Tensor, highest: int) -> bool:
    """Whether all values are whole numbers from 0 to `highest`."""
    return bool(((values >= 0) & (values <= highest) & (values == values.round())).all())


def refuse_differing(file: Path, names: list[str]) -> None:
    """Raise QuantizationFileError if there are tensors that do not fit the module."""
    if names:
        raise QuantizationFileError(f"{file} is of another module: {listed(sorted(names))} differ")


def refuse_damaged(file: Path, names: list[str], floats: Mapping[str, Tensor]) -> None:
    """Raise QuantizationFileError if there are layers with values that cannot be, or `floats` not finite."""
    names = names + [name for name, t in floats.items() if t.is_floating_point() and not finite(t)]
    if names:
        raise QuantizationFileError(
            f"{file} is damaged: {listed(sorted(names))} hold values that are not finite or out of range; "
            "copy it again"
        )
