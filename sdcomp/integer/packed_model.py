"""Models that hold n-bit weights in memory, and unpack one layer's at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mode

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.integer.execution import check_dtype
from sdcomp.integer.int8_model import assemble, call_in, float_tensors
from sdcomp.integer.packed_layers import NBitLayer, Workspace, nbit_layer, pack_weight
from sdcomp.model.kinds import require_kind
from sdcomp.model.rebuild import normal_tensors
from sdcomp.quantization.attention import refuse_quantized_products
from sdcomp.quantization.layer_specs import LayerSpec
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.model_base import QuantizedModel
from sdcomp.quantization.not_calibrated import require_calibrated
from sdcomp.quantization.quantizer import UniformQuantizer
from sdcomp.quantization.shared_state import QuantState
from sdcomp.quantization.timestep_argument import TimestepArgument


@dataclass(frozen=True)
class Timesteps:
    """The timestep intervals of a model: see `QuantModel.starts` and `TimeStepCalibratedQuantModel`."""

    starts: list[int]
    train_timesteps: int
    timestep_arg: int | str | None


class PackedModel(QuantizedModel):
    """A quantized model with n-bit weights, called like the module; made by `to_packed`.

    Each layer unpacks its weight into `dtype` when it runs and computes in floating point, on any device:
    that saves memory and disk, and takes somewhat longer than the plain model. At most one dense weight is
    alive at a time. In float32 the outputs are those of the simulation bit for bit, for weights that are laid
    out contiguously, as loading does. Inputs are rounded where the simulation rounds them.

    Floating-point arguments of two and more dimensions are converted to `dtype`, and results back to the type
    of the first of them. `to` changes device and `dtype`. Calls raise what `TimeStepCalibratedQuantModel`
    raises. For inference only.

    `layers`: for each quantized layer how it is quantized, and its tensors, see `NBitLayer`. `floats`: all
    other tensors, in place of the module's own. The module itself stays as it is.
    """

    calibrated = True

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, tuple[LayerSpec, dict[str, Tensor | None]]],
        floats: Mapping[str, Tensor],
        timesteps: Timesteps,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = check_dtype(dtype)
        self.starts, self.train_timesteps = list(timesteps.starts), timesteps.train_timesteps
        self.timestep_arg = timesteps.timestep_arg
        if self.timestep_arg is not None:
            self._argument = TimestepArgument.of(module, self.timestep_arg)
        self.state, self._workspace = QuantState(), Workspace()
        with normal_tensors():
            twins = {}
            for name, (spec, tensors) in layers.items():
                bias = tensors["bias"]
                tensors = {**tensors, "bias": None if bias is None else bias.to(dtype)}
                layer = module.get_submodule(name)
                twins[name] = nbit_layer(layer, name, spec, tensors, self.state, self._workspace)
            self.module = assemble(module, twins, floats, dtype)
        self.eval()

    def quantized_layers(self) -> list[NBitLayer]:
        """The layers with n-bit weights, in the module's order; each knows its `name`."""
        return [layer for layer in self.module.modules() if isinstance(layer, NBitLayer)]

    @property
    def weight_quantizer(self) -> UniformQuantizer:
        """The quantizer that most weights have."""
        return mode(layer.weight_quantizer for layer in self.quantized_layers())

    @property
    def act_quantizer(self) -> UniformQuantizer | None:
        """The quantizer that most inputs have, None where inputs are not quantized."""
        return mode(layer.act_quantizer for layer in self.quantized_layers())

    def clear_cache(self) -> None:
        """Free the memory of the unpacked weight; the next call takes it again."""
        self._workspace.clear()

    def forward(self, *args: object, **kwargs: object) -> object:
        kwargs = self._enter(args, kwargs)
        try:
            return call_in(self.dtype, self.module, args, kwargs)
        finally:
            self.state.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModel:
        # Ask what `to` makes of a floating-point tensor, before any tensor of the model changes.
        dtype = check_dtype(fn(torch.empty(0, dtype=self.dtype)).dtype)
        super()._apply(fn, recurse)
        self.dtype = dtype
        self.clear_cache()
        return self

    def extra_repr(self) -> str:
        """Bits, type and intervals."""
        bits = sorted({layer.weight_quantizer.n_bits for layer in self.quantized_layers()})
        inputs = "" if self.act_quantizer is None else f", {self.act_quantizer.n_bits}-bit inputs"
        intervals = "" if self.timestep_arg is None else f", intervals={self.intervals}"
        weights = " and ".join(map(str, bits))
        return f"{weights}-bit weights unpacked layer by layer{inputs}, {self.dtype}{intervals}"


def to_packed(model: QuantModel, dtype: torch.dtype | None = None) -> PackedModel:
    """Pack the weights of a quantized model, n bits each, on the same device; `model` stays as it is.

    The packed model computes in `dtype`: float32, bfloat16 or float16, by default the model's own. It rounds
    inputs as the simulation does: to calibrated grids, or to a grid for each token that each call finds anew.
    If the model's activations are switched off, it rounds none.

    Raises UserError for a model or a layer whose weights are not quantized, and for quantized attention
    products; NotCalibratedError where inputs have no scales yet; ValueError for another dtype; TypeError
    for another kind of model.
    """
    require_kind(model, QuantModel, "to_packed takes a QuantModel")
    model.state.refuse_training("to_packed()")
    if model.weight_quantizer is None:
        raise UserError("the weights are not quantized, so there is nothing to pack")
    if not model.state.weights:
        raise UserError("the weights are switched off: call set_use_quant(weights=True) before to_packed()")
    activations = model.state.activations
    if activations:
        require_calibrated(
            model, "before to_packed(), or switch them off with set_use_quant(activations=False)"
        )
    refuse_quantized_products(model, "a packed model")
    layers = {layer.name: _packed(layer, activations) for layer in model.quantized_layers()}
    floats = dict(float_tensors(model.module, layers))
    timesteps = Timesteps(model.starts, model.train_timesteps, getattr(model, "timestep_arg", None))
    dtype = model.quantized_layers()[0].weight.dtype if dtype is None else dtype
    return PackedModel(model.module, layers, floats, timesteps, dtype)


def _packed(layer: QuantLayer, activations: bool) -> tuple[LayerSpec, dict[str, Tensor | None]]:
    """How a layer is quantized, and its tensors."""
    spec = layer.spec
    if spec.weight_quantizer is None:
        raise UserError(
            f"layer {layer.name} cannot be packed, since its weight is not quantized: leave it out of the"
            " quantization with quant_filters, or give its weight 8 bits"
        )
    tensors = pack_weight(layer)
    if not activations:
        spec = LayerSpec(spec.weight_quantizer, None, spec.intervals, spec.split)
        tensors |= {"act_scale": None, "act_zero_point": None}
    return spec, tensors
