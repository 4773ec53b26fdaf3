"""Convolutions and linear layers that simulate quantized weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import ref

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.layers import Linear, linear
from sdcomp.model.rebuild import normal_tensors, shared
from sdcomp.quantization.layer_base import QuantizedLayer
from sdcomp.quantization.layer_specs import LayerSpec
from sdcomp.quantization.scales import STORED, Grid
from sdcomp.quantization.shared_state import QuantState

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""A module's hooks of the forward pass, and how they want to be called."""


class QuantLayer(QuantizedLayer):
    """What `QuantConv2d` and `QuantLinear` have in common.

    `weight`, `bias`: full precision, their memory shared with the original layer. `spec`: quantizers and
    intervals, see `LayerSpec`.

    `weight_scale`, `weight_zero_point`: buffers in the shapes that `UniformQuantizer.grid` gives, with a
    first dimension of 2 if there is a split. `weight_integers`: a buffer of the weight's shape with the
    multiples of the scale that a method such as second-order rounding chose; None where each weight goes to
    the nearest. Buffers `(k,)`, one value for each timestep interval, or `(k, 2)` with a split: `act_scale`
    (0: not calibrated), `act_zero_point`, and `act_clipped`, the share of calibration values beyond the
    range. Zero points are there for affine grids. All are float32 and stay so when the model is converted.
    Where there is a low-rank branch, the weight without it is rounded: see `rounded_part`.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_integers: Tensor | None
    act_clipped: Tensor | None

    @classmethod
    def from_float(cls, layer: nn.Module, name: str, state: QuantState, spec: LayerSpec) -> QuantLayer:
        """Make the quantized twin of a layer; it shares the layer's weight, bias and hooks.

        Raises UserError for weights that are not finite, or that a hook computes at each call.
        """
        if "weight" not in layer._parameters:
            raise UserError(
                f"the weight of layer {name} is computed at each call: call torch.nn.utils.prune.remove or"
                " remove_weight_norm first"
            )
        made = cls._like(layer)
        made.name, made.state, made.spec = name, state, spec
        made.weight, made.bias = (
            p if p is None else shared(p, p.requires_grad) for p in (layer.weight, layer.bias)
        )
        for kind in _HOOKS:
            setattr(made, kind, getattr(layer, kind).copy())
        made._fake_weight = None
        for kind in ("weight_integers", "branch_down", "branch_up"):
            made.register_buffer(kind, None)
        grids = [Grid(None)]
        if spec.weight_quantizer is not None:
            try:
                grids = [spec.weight_quantizer.grid(half) for half in made.halves(layer.weight.detach())]
            except UserError:
                raise UserError(
                    f"the weight of layer {name} has NaN or infinite values: check the model's file"
                ) from None
        made.set_weight_grids(grids)
        acts = zeros = None
        if spec.calibrated:
            halves = [] if spec.split is None else [2]
            acts = torch.zeros(spec.intervals, *halves, device=layer.weight.device)
            zeros = None if spec.act_quantizer.symmetric else acts.clone()
        made.register_buffer("act_scale", acts)
        made.register_buffer("act_zero_point", zeros)
        made.register_buffer("act_clipped", None if acts is None else acts.clone())
        made._read_input_grids()
        return made

    @classmethod
    def _like(cls, layer: nn.Module) -> QuantLayer:
        """Construct a layer of the same geometry, without memory for its weights."""
        raise NotImplementedError

    def set_weight_grids(self, grids: list[Grid]) -> None:
        """Take over the grids of the weight, or of each of its halves."""
        for kind, halves in zip(("scale", "zero_point"), zip(*grids, strict=True), strict=True):
            split = self.split is not None and halves[0] is not None
            self.register_buffer(f"weight_{kind}", torch.stack(halves) if split else halves[0])
        self.clear_cache()

    def set_rounded(self, weight: Tensor, grids: list[Grid] | None = None) -> None:
        """Take over a rounded weight that a method chose, with its grids if they are new.

        `weight` has the shape of the layer's, or is the matrix `(out, columns)`. It lies on the grids.
        """
        if grids is not None:
            self.set_weight_grids(grids)
        pairs = zip(self.halves(weight.view_as(self.weight)), self.weight_grids(), strict=True)
        integers = torch.cat([self.weight_quantizer.integers(half, grid) for half, grid in pairs], dim=1)
        self.register_buffer("weight_integers", integers)
        self.clear_cache()

    def set_branch(self, down: Tensor, up: Tensor) -> None:
        """Take over the factors of a low-rank branch, `(rank, columns)` and `(out, rank)`.

        They are rounded to `STORED`. The grids become those of the rest of the weight.
        """
        self.register_buffer("branch_down", down.to(STORED).float().view(-1, *self.weight.shape[1:]))
        self.register_buffer("branch_up", up.to(STORED).float())
        self.register_buffer("weight_integers", None)
        self.set_weight_grids([self.weight_quantizer.grid(half) for half in self.halves(self.rounded_part())])

    def rounded_part(self) -> Tensor:
        """Return what is rounded: the weight, without the product of a low-rank branch."""
        weight, branch = self.weight.detach(), self.branch_weight()
        return weight if branch is None else weight - branch.view_as(weight).to(weight.dtype)

    def halves(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return a weight itself, or its two halves if there is a split."""
        if self.split is None:
            return (weight,)
        return weight.split([self.split, weight.shape[1] - self.split], dim=1)

    def weight_grids(self) -> list[Grid]:
        """The grid of the weight, or of each of its halves."""
        if self.split is None:
            return [Grid(self.weight_scale, self.weight_zero_point)]
        zeros = [None, None] if self.weight_zero_point is None else self.weight_zero_point
        return [Grid(scale, zero) for scale, zero in zip(self.weight_scale, zeros, strict=True)]

    def per_half(self, function: Callable[[Tensor, Grid], Tensor], weight: Tensor | None = None) -> Tensor:
        """Apply `function(weight, grid)` to the `rounded_part`, or to each half and join the results.

        Another tensor of its shape may be given for the weight.
        """
        weight = self.rounded_part() if weight is None else weight
        pairs = zip(self.halves(weight), self.weight_grids(), strict=True)
        halves = [function(half, grid) for half, grid in pairs]
        return halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)

    def integer_weight(self) -> Tensor:
        """Return the rounded part as multiples of its scale: int8, or int16 for 8 bits and affine.

        Raises ValueError where weights are not quantized.
        """
        if self.weight_quantizer is None:
            raise ValueError(f"the weights of {self.name} are not quantized")
        if self.weight_integers is not None:
            return self.weight_integers
        return self.per_half(self.weight_quantizer.integers)

    def fake_weight(self) -> Tensor:
        """Return the rounded part after rounding. It is made once, and kept until the weight changes."""
        weight = self.weight if self.weight_integers is None else self.weight_integers
        # Inference tensors do not count their changes; a tracer's tensors must not outlive it.
        keep = not (weight.is_inference() or torch.compiler.is_compiling())
        if keep and self._fake_weight is not None:
            made_of, version, made = self._fake_weight
            # The tensor is compared too, not only its version: `weights_on` replaces the weight.
            if made_of() is weight and version == weight._version:
                return made
        with normal_tensors():
            if weight is self.weight:
                made = self.per_half(self.weight_quantizer.simulate)
            else:
                made = self.per_half(self.weight_quantizer.dequantize, weight).to(self.weight.dtype)
            if weight.dim() == 4 and not weight.is_contiguous():
                made = made.contiguous(memory_format=torch.channels_last)
        if keep:
            self._fake_weight = (ref(weight), weight._version, made)
        return made

    def clear_cache(self) -> None:
        """Free the rounded weight; the next call that needs it makes it again."""
        self._fake_weight = None

    def set_act_scales(self, scales: Tensor, clipped: Tensor, zero_points: Tensor | None = None) -> None:
        """Take over what a calibration found, in the shape of `act_scale`."""
        self.act_scale.copy_(scales)
        self.act_clipped.copy_(clipped)
        if zero_points is not None:
            self.act_zero_point.copy_(zero_points)
        self._read_input_grids()

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the weight to compute with."""
        state, grids = self.state, None
        if state.only not in (None, self.name):
            return x, self.weight
        if state.operands is not None:
            return state.operands(self, x)
        if self.spec.calibrated:
            if state.observer is not None:
                grids = state.observer(self, x)
            elif state.activations:
                grids = self.input_grids()
        elif self.act_quantizer is not None and state.activations and state.observer is None:
            x = self._round_tokens(x)
        if grids is not None:
            x = state.quantize(x, grids, self.split)
        quantized = state.weights and self.weight_quantizer is not None
        return x, self.fake_weight() if quantized else self.weight

    def extra_repr(self) -> str:
        """Geometry, and how the layer is quantized at present."""
        on = replace(
            self.spec,
            weight_quantizer=self.weight_quantizer if self.state.weights else None,
            act_quantizer=self.act_quantizer if self.state.activations else None,
        )
        return f"{super().extra_repr()}, {on}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        super()._apply(fn, recurse)
        self.clear_cache()
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fake_weight": None}  # a copy makes its own

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.clear_cache()


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with simulated quantization; see `QuantLayer`."""

    @classmethod
    def _like(cls, layer: nn.Conv2d) -> QuantConv2d:
        return cls(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        rounded, weight = self._operands(x)
        output = self._conv_forward(rounded, weight, self.bias)
        return output if weight is self.weight else self._plus_branch(output, x)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with simulated quantization; see `QuantLayer`."""

    @classmethod
    def _like(cls, layer: nn.Linear) -> QuantLinear:
        return cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        rounded, weight = self._operands(x)
        output = linear(rounded, weight, self.bias)
        return output if weight is self.weight else self._plus_branch(output, x)


_KINDS: dict[type, type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, Linear: QuantLinear}


def is_quantizable(layer: nn.Module) -> bool:
    """Whether a layer is exactly one of `_KINDS`; subclasses may compute something else."""
    return type(layer) in _KINDS


def quantize_layer(layer: nn.Module, name: str, state: QuantState, spec: LayerSpec) -> QuantLayer:
    """Make the quantized twin of a convolution or linear layer."""
    return _KINDS[type(layer)].from_float(layer, name, state, spec)
