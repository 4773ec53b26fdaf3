"""Models with int8 weights, called like the module that was quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sdcomp.errors import UserError
from sdcomp.integer.execution import check_dtype, why_no_kernels
from sdcomp.integer.int8_blocks import layer_kind, specialize
from sdcomp.integer.int8_layers import Int8Layer
from sdcomp.model.rebuild import normal_tensors, rebuild
from sdcomp.quantization.model_base import QuantizedModel
from sdcomp.quantization.shared_state import QuantState
from sdcomp.quantization.timestep_argument import TimestepArgument


class Int8Model(QuantizedModel):
    """A quantized model with int8 weights, called like the module; made by `to_int8`.

    `execution` is "kernels" or "dequantized": see `sdcomp.integer.execution.choose_execution`. Everything but
    the quantized layers computes in `dtype`: floating-point arguments of two and more dimensions are
    converted to it, and results back to the type of the first of them. `to` changes both, within what the
    execution allows. The scales are those of the timestep's interval where the model is timestep-aware;
    calls raise what `TimeStepCalibratedQuantModel` raises. For inference only.

    Integers cannot hold NaN, so the model gives NaN for each row whose input has one. Between the kernels no
    NaN arises from finite inputs: norms, softmax and integer products stay within float32's range. The
    constructor checks that all other tensors are finite.

    `integers`: the tensors of each quantized layer by its name, see `Int8Layer`; the dictionary is emptied.
    `floats`: all other tensors by name. `settings`: as `to_int8` writes them.

    Raises UserError for tensors that are not finite.
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
        self.dtype, self.execution = getattr(torch, settings["dtype"]), settings["execution"]
        self.weight_max = largest_weight(integers)
        self.state = QuantState()
        self.starts, self.train_timesteps = settings["starts"], settings["train_timesteps"]
        self.timestep_arg = settings["timestep_arg"]
        if self.timestep_arg is not None:
            self._argument = TimestepArgument.of(module, self.timestep_arg)
        with normal_tensors():
            layers = _int8_layers(module, integers, self.settings, self.state)
            self.module = assemble(module, layers, floats, self.dtype)
            _check_finite(self.module)
            if self.execution == "kernels":
                self.module = specialize(self.module)
                for layer in layers.values():
                    layer.pack()
        self.eval()

    def forward(self, *args: object, **kwargs: object) -> object:
        kwargs = self._enter(args, kwargs)
        if self.execution != "kernels":
            return call_in(self.dtype, self.module, args, kwargs)
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.is_floating_point()]
        for x in given:
            self._require(x.device, self.dtype)
        # The kernels' outputs have the channels last, so everything has.
        args, kwargs = tree_map_only(Tensor, _channels_last, (args, kwargs))
        out = call_in(self.dtype, self.module, args, kwargs)
        for x in given:
            if x.isnan().any():
                out = tree_map_only(Tensor, partial(_spread_nan, x), out)
        return out

    def _require(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise UserError if this model's execution does not run on a device in a type."""
        kernels = self.execution == "kernels"
        if kernels and (reason := why_no_kernels(device, dtype, self.weight_max)) is not None:
            raise UserError(
                f"{reason}, and this model's weights are packed for them: load or make it anew with"
                " execution='dequantized'"
            )
        check_dtype(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Model:
        # Ask what `to` makes of a floating-point tensor, before any tensor of the model changes.
        made = fn(torch.empty(0, dtype=self.dtype))
        self._require(made.device, made.dtype)
        super()._apply(fn, recurse)
        self.dtype = made.dtype
        self.settings["dtype"] = str(made.dtype).removeprefix("torch.")
        return self

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: object, **kwargs: object) -> object:
        """As `nn.Module`'s; raises UserError for larger integers than the model has."""
        weights = {name: {"weight": t} for name, t in state_dict.items() if t.dtype == torch.int8}
        if largest_weight(weights) > self.weight_max:
            raise UserError(
                "these weights have more bits than the model's: load the folder that they are of, or convert"
                " the simulation again"
            )
        found = super().load_state_dict(state_dict, *args, **kwargs)
        _check_finite(self.module)
        return found

    def extra_repr(self) -> str:
        s = self.settings
        how = "int8 kernels" if self.execution == "kernels" else "weights dequantized layer by layer"
        intervals = "" if self.timestep_arg is None else f", intervals={self.intervals}"
        return f"{s['weight_bits']}-bit weights, {s['act_bits']}-bit inputs, {self.dtype}, {how}{intervals}"


def call_in(dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: Mapping[str, object]) -> object:
    """Call a module that computes in `dtype`, without gradients.

    Floating-point arguments of two and more dimensions are converted to `dtype`, and results back to the
    type of the first of them. Timesteps, which have no second dimension, keep theirs: bfloat16 has no 999.
    """
    wide = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and _is_converted(x)]
    before = wide[0].dtype if wide else dtype

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if _is_converted(x) else x

    args, kwargs = tree_map_only(Tensor, convert, (args, dict(kwargs)))
    with torch.no_grad():
        out = module(*args, **kwargs)
    return out if before == dtype else tree_map_only(Tensor, lambda x: x.to(before), out)


def _is_converted(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() > 1


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def assemble(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    floats: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> nn.Module:
    """Copy a module with `layers` in place of its own, and all that is not theirs in `dtype`.

    `floats`: new tensors by name, in place of the module's own.
    """
    # Contiguous, as `StableDiffusion` wants a UNet on CPU.
    new = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, old in [*module.named_parameters(), *module.named_buffers()]
        if name.rpartition(".")[0] not in layers
        for tensor in [floats.get(name, old).detach()]
    }
    return rebuild(module, layers, new).requires_grad_(False)


def _int8_layers(
    module: nn.Module,
    integers: dict[str, dict[str, Tensor | None]],
    settings: Mapping[str, object],
    state: QuantState,
) -> dict[str, Int8Layer]:
    """Make the integer layers of a module; empties `integers`, so that no plain weight lives longer."""
    layers = {}
    for name in list(integers):
        split = settings["splits"].get(name)
        bits = settings["layer_act_bits"].get(name, settings["act_bits"])
        kind = layer_kind(module, name, split)
        layers[name] = kind(module.get_submodule(name), name, integers.pop(name), split, bits, state)
    return layers


def float_tensors(module: nn.Module, integers: Mapping[str, object]) -> list[tuple[str, Tensor]]:
    """The tensors of a module's state dict that do not belong to the layers in `integers`."""
    return [
        (name, tensor)
        for name, tensor in module.state_dict().items()
        if name.rpartition(".")[0] not in integers
    ]


def largest_weight(integers: Mapping[str, Mapping[str, Tensor | None]]) -> int:
    """The largest magnitude of the layers' integer weights."""
    weights = [tensors["weight"] for tensors in integers.values()]
    if any(weight.is_meta for weight in weights):
        return 127  # values that nobody knows
    return max((max(-int(low), int(high)) for low, high in (w.aminmax() for w in weights)), default=0)


def _check_finite(module: nn.Module) -> None:
    """Raise UserError for a tensor with NaN or infinite values, which integers would hide."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise UserError(f"{name} has NaN or infinite values: check the model's file, or use a wider type")


def _spread_nan(x: Tensor, out: Tensor) -> Tensor:
    """NaN in the rows of `out` in which `x` has one."""
    rows = x.isnan().reshape(len(x) if x.dim() else 1, -1).any(dim=1)
    rows = rows if len(rows) in (1, len(out)) else rows.any()[None]
    return out.masked_fill(rows.view(-1, *[1] * (out.dim() - 1)), float("nan"))
