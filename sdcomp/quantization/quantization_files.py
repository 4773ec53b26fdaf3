"""Quantized models as files: scales in safetensors, everything else in JSON. Weights are not included."""

from __future__ import annotations

import json
import os
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.files import resolve_input, write_tensors, write_text
from sdcomp.model.files.tensors import listed, read_json, read_safetensors
from sdcomp.quantization.attention import ASKED
from sdcomp.quantization.layer_sets import SIDES
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.quantizer import BITS, GRANULARITIES, SCALE_METHODS
from sdcomp.settings import (
    ANYTHING,
    FLAG,
    AnyOf,
    ListOf,
    Number,
    OneOf,
    Rule,
    TableOf,
    Text,
    Whole,
    check_settings,
    plain,
    within,
)

CONFIG, SCALES = "quantization.json", "quantization.safetensors"
_KINDS = {kind.__name__: kind for kind in (QuantModel, TimeStepCalibratedQuantModel)}

TRAIN_TIMESTEPS = Whole(1, 100_000)
TIMESTEP_ARG = AnyOf(Whole(0, 100), Text(100))
"""Where a module takes its timesteps: a position or a name."""
_INTERVALS = 1000
_TABLE, _TABLE_OR_NONE = TableOf(ANYTHING), AnyOf(OneOf(None), TableOf(ANYTHING))
_RULES: dict[str, Rule] = {
    "kind": OneOf(*_KINDS),
    "arguments": _TABLE,
    "use_quant": _TABLE,
    "intervals": ListOf(ListOf(Whole(0, 100_000), 2, 2), 1, _INTERVALS),
    "calibration": _TABLE,
}
_QUANTIZER: dict[str, Rule] = {
    "n_bits": BITS,
    "granularity": OneOf(*GRANULARITIES),
    "channel_wise": FLAG,  # in files from before there were groups
    "symmetric": FLAG,
    "scale_method": OneOf(*SCALE_METHODS),
    "group_size": Whole(1, 1_000_000),
    "norm": Number(1, 16),
}
_PLAIN: dict[str, Rule] = {
    "weight_quant_params": _TABLE_OR_NONE,
    "act_quant_params": _TABLE_OR_NONE,
    "quant_filters": ListOf(Text(), 0, 1000),
    "overrides": TableOf(TableOf(_TABLE_OR_NONE)),
    "split_shortcuts": FLAG,
    "quantize_attention_products": ASKED,
}
_ARGUMENTS = {
    "QuantModel": _PLAIN,
    "TimeStepCalibratedQuantModel": {
        **_PLAIN,
        "timesteps": TRAIN_TIMESTEPS,
        "k": Whole(1, _INTERVALS),
        "boundaries": OneOf("uniform", "optimal"),
        "timestep_arg": TIMESTEP_ARG,
        "train_timesteps": TRAIN_TIMESTEPS,
    },
}
"""What the settings in `quantization.json` must be."""
_BUFFERS = (
    "weight_scale",
    "weight_zero_point",
    "weight_integers",
    "act_scale",
    "act_zero_point",
    "act_clipped",
    "branch_down",
    "branch_up",
)
"""What a layer adds to the state dict."""
_LARGEST = {"weight_zero_point": 255, "act_zero_point": 255}


def starts_rule(train_timesteps: int) -> Rule:
    """The rule for the first timesteps of the intervals: ascending, starting with 0."""
    return ListOf(Whole(0, train_timesteps - 1), 1, _INTERVALS, ascending=True, first=0)


class QuantizationFileError(UserError):
    """A saved quantization cannot be read, or is of another module; the message says what to do."""


def quantization_state(model: QuantModel) -> dict[str, Tensor]:
    """Return what quantization added to the state dict, by its names there."""
    buffers = dict(model.named_buffers(recurse=False))
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for kind in _BUFFERS:
                if getattr(layer, kind) is not None:
                    buffers[f"{name}.{kind}"] = getattr(layer, kind)
    return buffers


def save_quant_model(model: QuantModel, folder: str | Path) -> Path:
    """Write `quantization.json` and `quantization.safetensors` into a folder; returns it.

    The weights stay where they are: `load_quant_model` is given the module. Raises UserError where the
    folder cannot be written, and for a model in training.
    """
    model.state.refuse_training("save_quant_model()")
    folder = Path(folder).expanduser()
    config = {
        "kind": type(model).__name__,
        "arguments": model.arguments(),
        "use_quant": {"weights": model.state.weights, "activations": model.state.activations},
        "intervals": model.intervals,
        "calibration": model.calibration,
    }
    text = json.dumps(config, indent=2, default=plain)
    write_tensors(folder / SCALES, quantization_state(model))
    write_text(folder / CONFIG, text + "\n")
    return folder


def load_quant_model(folder: str | Path, module: nn.Module) -> QuantModel:
    """The quantized model that was saved, around a module with the weights that it was made for.

    Outputs are those of the saved model bit for bit. Raises QuantizationFileError, a ValueError, when a
    file is missing, damaged, or made for a module with other layers.
    """
    folder = resolve_input(folder)
    for file in (CONFIG, SCALES):
        if not os.path.lexists(folder / file):
            raise QuantizationFileError(f"{folder} is no saved quantization: it has no {file}")

    def build(config: dict[str, Any]) -> QuantModel:
        _check(config)
        model = _KINDS[config["kind"]](module, **config["arguments"]).set_use_quant(**config["use_quant"])
        model.calibration = dict(config["calibration"])
        return model

    model = read_json(folder / CONFIG, build, "does not fit this module", QuantizationFileError)
    load_quantization_state(model, folder / SCALES)
    return model


def load_quantization_state(model: QuantModel, file: Path) -> None:
    """Take over what `quantization_state` gave, from a safetensors file.

    Raises QuantizationFileError for a file that is damaged or of another module.
    """
    saved = read_safetensors(file, QuantizationFileError)
    for name, layer in model.named_modules():
        if not (isinstance(layer, QuantLayer) and layer.weight_quantizer):
            continue
        shape, device = layer.weight.shape, layer.weight.device
        if f"{name}.weight_integers" in saved:
            integers = torch.zeros(shape, dtype=layer.weight_quantizer.integer_dtype, device=device)
            layer.register_buffer("weight_integers", integers)
        if f"{name}.branch_up" in saved:
            rank = max(saved[f"{name}.branch_up"].shape[-1:].numel(), 1)
            layer.register_buffer("branch_down", torch.zeros(rank, *shape[1:], device=device))
            layer.register_buffer("branch_up", torch.zeros(shape[0], rank, device=device))
    wanted = quantization_state(model)
    differing = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name not in saved
        or name not in wanted
        or (saved[name].shape, saved[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    )
    if differing:
        raise QuantizationFileError(f"{file} was made for another module: {listed(differing)} differ")
    wrong = [name for name, tensor in saved.items() if not _sound(name, tensor, model.train_timesteps)]
    if wrong:
        raise QuantizationFileError(
            f"{file} is damaged: {listed(sorted(wrong))} hold values that are not finite or out "
            "of range; copy it again"
        )
    model.load_state_dict(saved, strict=False)


def _check(config: dict[str, Any]) -> None:
    """Raise UserError unless all settings are there, each of its type and in its range."""
    check_settings(config, _RULES)
    arguments = config["arguments"]
    with within("arguments"):
        check_settings(arguments, _ARGUMENTS[config["kind"]], optional=_ARGUMENTS[config["kind"]])
        for where in (arguments, *arguments.get("overrides", {}).values()):
            for side in SIDES:
                if where.get(side) is not None:
                    with within(side):
                        check_settings(where[side], _QUANTIZER, optional=_QUANTIZER)
    with within("use_quant"):
        check_settings(config["use_quant"], {"weights": FLAG, "activations": FLAG})


def _sound(name: str, tensor: Tensor, train_timesteps: int) -> bool:
    """Whether a buffer has values that it can have; an input scale of 0 is one that is not calibrated."""
    kind = name.rpartition(".")[2]
    if kind == "interval_starts":
        return starts_rule(train_timesteps)(tensor.tolist())
    if not tensor.is_floating_point():
        return True
    if kind.startswith("branch"):
        return bool(tensor.isfinite().all())
    if kind.endswith("zero_point") and not (tensor == tensor.round()).all():
        return False
    within_range = (
        tensor > 0 if kind == "weight_scale" else (tensor >= 0) & (tensor <= _LARGEST.get(kind, inf))
    )
    return bool(tensor.isfinite().all() and within_range.all())
