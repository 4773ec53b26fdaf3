"""Models with int8 weights as files: integers and scales in safetensors, everything else in JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdcomp.files import replacing, resolve_input
from sdcomp.integer.execution import DTYPES, choose_execution
from sdcomp.integer.int8_model import Int8Model, float_tensors
from sdcomp.integer.layers import TENSORS as LAYER_TENSORS
from sdcomp.integer.layers import Int8Conv2d, Int8Layer, Int8Linear
from sdcomp.model.config import UNetConfig, from_dict
from sdcomp.model.device import check_device
from sdcomp.model.files.tensors import finite, listed, read_json, read_safetensors
from sdcomp.model.layers import Linear
from sdcomp.model.shrinking import apply_channel_map, channel_map
from sdcomp.model.unet import UNet
from sdcomp.quantization.layers import QuantConv2d, QuantLinear
from sdcomp.quantization.quantizer import BITS
from sdcomp.quantization.storage import TIMESTEP_ARG, TRAIN_TIMESTEPS, QuantizationFileError, starts_rule
from sdcomp.settings import ANYTHING, AnyOf, OneOf, Rule, TableOf, Whole, check_settings, within

CONFIG, TENSORS = "int8.json", "int8.safetensors"
_KINDS: dict[type, type[Int8Layer]] = {
    nn.Conv2d: Int8Conv2d,
    nn.Linear: Int8Linear,
    Linear: Int8Linear,
    QuantConv2d: Int8Conv2d,
    QuantLinear: Int8Linear,
}
_SETTINGS: dict[str, Rule] = {
    "weight_bits": BITS,
    "act_bits": BITS,
    "layer_act_bits": TableOf(BITS),
    "dtype": OneOf(*(str(dtype).removeprefix("torch.") for dtype in DTYPES)),
    "train_timesteps": TRAIN_TIMESTEPS,
    "timestep_arg": AnyOf(OneOf(None), TIMESTEP_ARG),
    "splits": TableOf(Whole(1, 2**31)),
}
"""What a file's settings must be."""


def save_int8(model: Int8Model, folder: str | Path) -> Path:
    """Write `int8.json` and `int8.safetensors` into a folder; returns it.

    The files hold integers and scales, and everything else in the model's `dtype`: a quarter of the bytes of
    float32.
    `load_int8` reads them. Raises UserError where the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    settings = {name: value for name, value in model.settings.items() if name != "execution"}
    if isinstance(model.module, UNet):
        settings["unet"] = dataclasses.asdict(model.module.config)
        settings["channels"] = channel_map(model.module)
    state = model.module.state_dict()
    with replacing(folder / TENSORS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


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
    folder = resolve_input(folder)
    for file in (CONFIG, TENSORS):
        if not os.path.lexists(folder / file):
            raise QuantizationFileError(f"{folder} is no saved int8 model: it has no {file}")

    def build(settings: dict[str, object]) -> tuple[dict[str, object], nn.Module | None]:
        rules = _SETTINGS | {"starts": ANYTHING}
        settings.setdefault("layer_act_bits", {})  # files of earlier versions have none
        check_settings({name: value for name, value in settings.items() if name in rules}, rules)
        check_settings({"starts": settings["starts"]}, {"starts": starts_rule(settings["train_timesteps"])})
        config, channels = settings.pop("unet", None), settings.pop("channels", {})
        unet = module
        if unet is None and config is not None:
            with within("unet"):
                unet = from_dict(UNetConfig, config)
        if isinstance(unet, UNetConfig):
            with torch.device("meta"):
                unet = apply_channel_map(UNet(unet), channels)
        return settings, unet

    settings, module = read_json(folder / CONFIG, build, "is damaged", QuantizationFileError)
    if module is None:
        raise QuantizationFileError(
            f"{folder / CONFIG} does not say what the module is: give one to load_int8"
        )
    state = read_safetensors(folder / TENSORS, QuantizationFileError)
    settings["execution"] = choose_execution(device, getattr(torch, settings["dtype"]), execution)
    names = {name.removesuffix(".weight_scale") for name in state if name.endswith("weight_scale")}
    integers = {name: {kind: state.pop(f"{name}.{kind}", None) for kind in LAYER_TENSORS} for name in names}
    _check(folder / TENSORS, module, integers, state, settings)
    return Int8Model(module, integers, state, settings).to(device)


def _check(
    file: Path, module: nn.Module, integers: Mapping, floats: Mapping[str, Tensor], settings: Mapping
) -> None:
    """Raise QuantizationFileError unless the tensors are of the module, quantized as the settings say."""
    wanted = dict(float_tensors(module, integers))
    layers = dict(module.named_modules())
    wrong = [name for name in wanted.keys() | floats.keys() if name not in wanted or name not in floats]
    for name in wanted.keys() & floats.keys():
        floating = wanted[name].is_floating_point()
        dtype = getattr(torch, settings["dtype"]) if floating else wanted[name].dtype
        if (floats[name].shape, floats[name].dtype) != (wanted[name].shape, dtype):
            wrong.append(name)
    splits, intervals = settings["splits"], len(settings["starts"])
    for name, tensors in integers.items():
        layer = layers.get(name)
        if type(layer) not in _KINDS or not _fits(layer, tensors, splits.get(name), intervals):
            wrong.append(name)
    wrong += [name for name in (*splits, *settings["layer_act_bits"]) if name not in integers]
    if wrong:
        raise QuantizationFileError(f"{file} is of another module: {listed(sorted(wrong))} differ")
    damaged = [name for name, tensor in floats.items() if tensor.is_floating_point() and not finite(tensor)]
    damaged += [name for name, tensors in integers.items() if not _sound(tensors)]
    if damaged:
        raise QuantizationFileError(
            f"{file} is damaged: {listed(sorted(damaged))} hold values that are not finite or out of range; "
            "copy it again"
        )


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
    codes = zeros is None or bool(((zeros >= 0) & (zeros <= 255) & (zeros == zeros.round())).all())
    return finite_values and codes and bool((scale > 0).all() and (act_scale >= 0).all())
