"""Models with int8 weights as files: integers and scales in safetensors, everything else in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcomp.files import resolve_input
from sdcomp.integer.execution import choose_execution
from sdcomp.integer.int8_layers import TENSORS as LAYER_TENSORS
from sdcomp.integer.int8_layers import Int8Conv2d, Int8Layer, Int8Linear
from sdcomp.integer.int8_model import Int8Model, float_tensors, largest_weight
from sdcomp.integer.model_files import (
    COMMON,
    Format,
    are_codes,
    check_common,
    differing,
    read_files,
    refuse_damaged,
    refuse_differing,
    write_files,
)
from sdcomp.model.config import UNetConfig
from sdcomp.model.device import check_device
from sdcomp.model.files.tensors import finite
from sdcomp.model.layers import Linear
from sdcomp.quantization.layers import QuantConv2d, QuantLinear
from sdcomp.quantization.quantizer import BITS
from sdcomp.settings import Rule, TableOf

FILES = Format("int8", "int8.json", "int8.safetensors")
_KINDS: dict[type, type[Int8Layer]] = {
    nn.Conv2d: Int8Conv2d,
    nn.Linear: Int8Linear,
    Linear: Int8Linear,
    QuantConv2d: Int8Conv2d,
    QuantLinear: Int8Linear,
}
_SETTINGS: dict[str, Rule] = {
    **COMMON,
    "weight_bits": BITS,
    "act_bits": BITS,
    "layer_act_bits": TableOf(BITS),
}
"""What a file's settings must be."""


def save_int8(model: Int8Model, folder: str | Path) -> Path:
    """Write `int8.json` and `int8.safetensors` into a folder; returns it.

    The files hold integers and scales, and everything else in the model's `dtype`: a quarter of the bytes of
    float32. `load_int8` reads them. Raises UserError where the folder cannot be written.
    """
    settings = {name: value for name, value in model.settings.items() if name != "execution"}
    return write_files(folder, FILES, model.module, settings, model.module.state_dict(), indent=2)


def load_int8(
    folder: str | Path,
    module: nn.Module | UNetConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    execution: str = "auto",
) -> Int8Model:
    """Load the model that `save_int8` wrote; on one machine its outputs are the saved one's bit for bit.

    `module`: one of the same architecture, whose weights do not matter, or the configuration of our UNet.
    Our UNet's files name theirs, pruned channels included, so it may be left out. `device` and `execution`
    are chosen together, see `to_int8`; the model's text and its `execution` say which it is.

    Raises QuantizationFileError, a ValueError, when a file is missing, damaged, or of another module;
    UserError for "kernels" where they are not available.
    """
    check_device(device)
    settings, module, state = read_files(folder, FILES, module, _settings)
    names = {name.removesuffix(".weight_scale") for name in state if name.endswith("weight_scale")}
    integers = {name: {kind: state.pop(f"{name}.{kind}", None) for kind in LAYER_TENSORS} for name in names}
    _check(resolve_input(folder) / FILES.tensors, module, integers, state, settings)
    dtype = getattr(torch, settings["dtype"])
    settings["execution"] = choose_execution(device, dtype, execution, largest_weight(integers))
    return Int8Model(module, integers, state, settings).to(device)


def _settings(settings: dict[str, object]) -> dict[str, object]:
    """Check the settings. Files of earlier versions have no bits of single layers, and may say more."""
    settings.setdefault("layer_act_bits", {})
    check_common({name: value for name, value in settings.items() if name in _SETTINGS}, _SETTINGS)
    return settings


def _check(
    file: Path, module: nn.Module, integers: Mapping, floats: Mapping[str, Tensor], settings: Mapping
) -> None:
    """Raise QuantizationFileError unless the tensors are of the module, quantized as the settings say."""
    wanted = dict(float_tensors(module, integers))
    layers = dict(module.named_modules())
    wrong = differing(floats, wanted, (getattr(torch, settings["dtype"]),))
    splits, intervals = settings["splits"], len(settings["starts"])
    for name, tensors in integers.items():
        layer = layers.get(name)
        if type(layer) not in _KINDS or not _fits(layer, tensors, splits.get(name), intervals):
            wrong.append(name)
    wrong += [name for name in (*splits, *settings["layer_act_bits"]) if name not in integers]
    refuse_differing(file, wrong)
    refuse_damaged(file, [name for name, tensors in integers.items() if not _sound(tensors)], floats)


def _fits(layer: nn.Module, tensors: Mapping[str, Tensor | None], split: int | None, intervals: int) -> bool:
    """Whether tensors are those of a layer in shape and type; `split` as in `QuantLayer`."""
    weight, scale, act_scale, zeros, bias = (tensors[kind] for kind in LAYER_TENSORS)
    if weight is None or scale is None or act_scale is None or (bias is None) != (layer.bias is None):
        return False
    halves = () if split is None else (2,)
    shapes = {(*halves, 1), (*halves, len(layer.weight))}
    return (
        (weight.dtype, weight.shape) == (torch.int8, layer.weight.shape)
        and scale.shape in shapes
        and act_scale.shape == (intervals, *halves)
        and (zeros is None or zeros.shape == act_scale.shape)
        and (split is None or split < weight.shape[1])
        and (bias is None or bias.shape == layer.bias.shape)
        and all(t.dtype == torch.float32 for t in (scale, act_scale, zeros, bias) if t is not None)
    )


def _sound(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether a layer's values can be; an input scale of 0 is one that is not calibrated."""
    _, scale, act_scale, zeros, bias = (tensors[kind] for kind in LAYER_TENSORS)
    finite_values = all(finite(t) for t in (scale, act_scale, zeros, bias) if t is not None)
    codes = zeros is None or are_codes(zeros, 255)
    return finite_values and codes and bool((scale > 0).all() and (act_scale >= 0).all())
