"""Real int8 execution of calibrated models, and its files."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sdcomp.errors import UserError
from sdcomp.files import find, replacing
from sdcomp.model.channels import apply_channel_map, channel_map
from sdcomp.model.checkpoint import finite, listed, read_json, read_safetensors
from sdcomp.model.config import UNetConfig, from_dict
from sdcomp.model.layers import Linear
from sdcomp.model.unet import UNet
from sdcomp.quantization import int8_kernels
from sdcomp.quantization.int8_blocks import specialize
from sdcomp.quantization.int8_layers import Int8Conv2d, Int8Layer, Int8Linear, Int8State
from sdcomp.quantization.layers import NotCalibratedError, QuantConv2d, QuantLinear
from sdcomp.quantization.model import QuantizedTwin, QuantModel, TimeStepCalibratedQuantModel, _locate
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
_DTYPES = (torch.float32, torch.bfloat16)
_TENSORS = ("weight", "weight_scale", "act_scale", "bias")
_SETTINGS: dict[str, Rule] = {
    "weight_bits": Whole(2, 8),
    "act_bits": Whole(2, 8),
    "dtype": OneOf(*(str(dtype).removeprefix("torch.") for dtype in _DTYPES)),
    "train_timesteps": TRAIN_TIMESTEPS,
    "timestep_arg": AnyOf(OneOf(None), TIMESTEP_ARG),
    "splits": TableOf(Whole(1, 2**31)),
}
"""What a file's settings must be."""


class Int8Model(QuantizedTwin):
    """A quantized model that computes in integers, called like the module; made by `QuantModel.to_int8`.

    Its quantized convolutions and linear layers hold int8 weights only, quantize their input and multiply
    integers, in oneDNN's kernels on CPU. All else is computed in `dtype`: floating-point arguments of two
    and more dimensions are converted to it, and results back to the type of the first of them. The scales
    are those of the timestep's interval where the model is timestep-aware; calls raise what
    `TimeStepCalibratedQuantModel` raises. For inference only.
    """

    def __init__(
        self,
        module: nn.Module,
        integers: dict[str, dict[str, Tensor | None]],
        floats: Mapping[str, Tensor],
        settings: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.dtype = getattr(torch, settings["dtype"])
        self.kernels = settings["kernels"]
        self.state = Int8State(2 ** (settings["act_bits"] - 1) - 1)
        self.starts, self.train_timesteps = settings["starts"], settings["train_timesteps"]
        self.timestep_arg = settings["timestep_arg"]
        if self.timestep_arg is not None:
            self._position, self._name = _locate(module, self.timestep_arg)
        with torch.inference_mode(False), torch.no_grad():
            self.module = _assemble(module, integers, floats, settings["splits"], self.state, self.dtype)
            if self.kernels:
                specialize(self.module)
                for layer in self.module.modules():
                    if isinstance(layer, Int8Layer):
                        layer.pack()
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> object:
        if self.timestep_arg is not None:
            kwargs = TimeStepCalibratedQuantModel._enter(self, args, kwargs)
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if self.kernels and any(value.device.type != "cpu" for value in given):
            raise UserError(
                "the integer kernels run on the CPU only; elsewhere use to_int8(fallback=True), which"
                " dequantizes weights in each call"
            )

        def enter(x: Tensor) -> Tensor:
            # Timesteps, which have no second dimension, keep their type: bfloat16 has no 999.
            x = x.to(self.dtype) if x.is_floating_point() and x.dim() > 1 else x
            # The kernels' outputs are channels last, so everything is.
            last = self.kernels and x.dim() == 4
            return x.contiguous(memory_format=torch.channels_last) if last else x

        with torch.no_grad():
            out = self.module(*map(_on(enter), args), **{k: _on(enter)(v) for k, v in kwargs.items()})
            before = next((x.dtype for x in given if x.dim() > 1), self.dtype)
            return out if before == self.dtype else tree_map_only(Tensor, lambda x: x.to(before), out)

    def save(self, folder: str | Path) -> Path:
        """Write `int8.json` and `int8.safetensors` into a folder; returns it.

        Integers, scales, and what is not quantized in the model's `dtype`: about a quarter of float32.
        `load_int8` reads them. Raises UserError where the folder cannot be written.
        """
        folder = Path(folder).expanduser()
        settings = {name: value for name, value in self.settings.items() if name != "kernels"}
        if isinstance(self.module, UNet):
            settings["unet"] = dataclasses.asdict(self.module.config)
            settings["channels"] = channel_map(self.module)
        state = self.module.state_dict()
        with replacing(folder / TENSORS) as partial:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
        with replacing(folder / CONFIG) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return folder

    def extra_repr(self) -> str:
        s = self.settings
        how = "int8 kernels" if self.kernels else "weights dequantized in each call"
        intervals = "" if self.timestep_arg is None else f", intervals={self.intervals}"
        return f"{s['weight_bits']}-bit weights, {s['act_bits']}-bit inputs, {self.dtype}, {how}{intervals}"


def to_int8(model: QuantModel, dtype: torch.dtype = torch.float32, fallback: bool = False) -> Int8Model:
    """A calibrated model as one that computes in integers; `model` stays as it is.

    Weights and activations of any number of bits up to 8 run on the 8-bit kernels. `dtype`, float32 or
    bfloat16, is what is between them: norms, activation functions, layers left out. Attention's products
    stay in float32 in our UNet: CPUs without matrix units are no faster in bfloat16. On identical inputs a
    float32 layer agrees with its simulation to 1e-5 relative.

    `fallback=True` needs no integer kernels: it keeps the integer weights and dequantizes them in each
    call, which saves memory and no time. It runs on any device; the packed kernels run on CPUs only. On CUDA
    its linear layers multiply integers where their shapes allow it (`torch._int_mm`: more than 16 rows, both
    sides of the weight multiples of 8); its convolutions are dequantized, since PyTorch has none in integers
    there. That way is tested on CPU only so far.

    Raises UserError where this machine's PyTorch has no working integer kernels, and for a model that is
    not calibrated or whose weights or activations are not quantized; ValueError for another dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype!r}")
    if model.weight_quantizer is None or model.act_quantizer is None:
        side = "weights" if model.weight_quantizer is None else "activations"
        raise UserError(f"int8 execution needs weights and activations quantized; the {side} are not")
    if not model.calibrated:
        raise NotCalibratedError("the activations have no scales yet: calibrate the model before to_int8()")
    if not fallback and (reason := int8_kernels.missing()):
        raise UserError(f"{reason}; to_int8(fallback=True) runs anywhere, dequantizing weights in each call")
    layers = {layer.name: layer for layer in model.quantized_layers()}
    integers = {
        name: {
            "weight": layer.integer_weight(),
            "weight_scale": layer.weight_scale,
            "act_scale": layer.act_scale,
            "bias": None if layer.bias is None else layer.bias.detach().float(),
        }
        for name, layer in layers.items()
    }
    timestep_aware = isinstance(model, TimeStepCalibratedQuantModel)
    settings = {
        "weight_bits": model.weight_quantizer.n_bits,
        "act_bits": model.act_quantizer.n_bits,
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": not fallback,
        "starts": list(model.starts),
        "train_timesteps": model.train_timesteps,
        "timestep_arg": model.timestep_arg if timestep_aware else None,
        "splits": {name: layer.split for name, layer in layers.items() if layer.split is not None},
    }
    return Int8Model(model.module, integers, dict(_floats(model.module, layers)), settings)


def load_int8(
    folder: str | Path, module: nn.Module | UNetConfig | None = None, *, fallback: bool = False
) -> Int8Model:
    """The model that `Int8Model.save` wrote; on one machine its outputs are the saved one's bit for bit.

    `module`: one of the same architecture, whose weights do not matter, or the configuration of our UNet.
    Our UNet's files name theirs, pruned channels included, so it may be left out. With
    `fallback`, or where the integer kernels are missing, weights are dequantized in each call, which the
    model's text says.

    Raises QuantizationFileError, a ValueError, when a file is missing, damaged, or of another module.
    """
    folder = find(folder)
    for file in (CONFIG, TENSORS):
        if not os.path.lexists(folder / file):
            raise QuantizationFileError(f"{folder} is no saved int8 model: it has no {file}")

    def build(settings: dict[str, object]) -> tuple[dict[str, object], nn.Module | None]:
        rules = _SETTINGS | {"starts": ANYTHING}
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
    settings["kernels"] = not fallback and int8_kernels.missing() is None
    names = {name.removesuffix(".weight_scale") for name in state if name.endswith("weight_scale")}
    integers = {name: {kind: state.pop(f"{name}.{kind}", None) for kind in _TENSORS} for name in names}
    _check(folder / TENSORS, module, integers, state, settings)
    return Int8Model(module, integers, state, settings)


def _check(
    file: Path, module: nn.Module, integers: Mapping, floats: Mapping[str, Tensor], settings: Mapping
) -> None:
    """Raise QuantizationFileError unless the tensors are of the module, quantized as the settings say."""
    wanted = dict(_floats(module, integers))
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
    wrong += [name for name in splits if name not in integers]
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
    weight, scale, act_scale, bias = (tensors[kind] for kind in _TENSORS)
    if weight is None or scale is None or act_scale is None or (bias is None) != (layer.bias is None):
        return False
    parts = () if split is None else (2,)
    shapes = {(*parts, 1), (*parts, len(layer.weight))}
    return (
        (weight.dtype, weight.shape) == (torch.int8, layer.weight.shape)
        and scale.shape in shapes
        and act_scale.shape == (intervals, *parts)
        and (split is None or split < weight.shape[1])
        and (bias is None or bias.shape == layer.bias.shape)
        and all(t.dtype == torch.float32 for t in (scale, act_scale, bias) if t is not None)
    )


def _sound(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether a layer's values can be; an input scale of 0 is one that is not calibrated."""
    _, scale, act_scale, bias = (tensors[kind] for kind in _TENSORS)
    finite_values = all(finite(t) for t in (scale, act_scale, bias) if t is not None)
    return finite_values and bool((scale > 0).all() and (act_scale >= 0).all())


def _floats(module: nn.Module, integers: Mapping[str, object]) -> list[tuple[str, Tensor]]:
    """What is in a module's state dict beside the layers that become integers."""
    return [
        (name, tensor)
        for name, tensor in module.state_dict().items()
        if name.rpartition(".")[0] not in integers
    ]


def _assemble(
    module: nn.Module,
    integers: dict[str, dict[str, Tensor | None]],
    floats: Mapping[str, Tensor],
    splits: Mapping[str, int],
    state: Int8State,
    dtype: torch.dtype,
) -> nn.Module:
    """A copy of the module with integer layers in place of those that are given, and new tensors."""
    memo: dict[int, object] = {}
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        new = floats.get(name, old).detach()
        if new.is_floating_point():
            new = new.to(dtype)
        new = new.contiguous()  # as `StableDiffusion` wants a UNet on CPU
        memo[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
    for name, layer in module.named_modules():
        if name in integers:
            # Given up by the caller, so that a plain weight lives no longer than until it is packed.
            tensors = integers.pop(name)
            memo[id(layer)] = _KINDS[type(layer)](layer, name, tensors, splits.get(name), state)
    return copy.deepcopy(module, memo)


def _on(function: Callable[[Tensor], Tensor]) -> Callable[[object], object]:
    return lambda value: function(value) if isinstance(value, Tensor) else value
