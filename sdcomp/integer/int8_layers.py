"""Convolutions and linear layers that hold and multiply 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.integer import int8_kernels
from sdcomp.model.layers import linear
from sdcomp.quantization.input_grids import InputGrid, input_grids
from sdcomp.quantization.not_calibrated import calibrated_grids
from sdcomp.quantization.quantizer import UniformQuantizer, fake_quantize
from sdcomp.quantization.shared_state import QuantState

TENSORS = ("weight", "weight_scale", "act_scale", "act_zero_point", "bias")
"""The tensors of an integer layer."""


class Int8Layer(nn.Module):
    """What `Int8Conv2d` and `Int8Linear` have in common.

    Made of a layer (for its geometry) and of tensors: `weight` int8 in the layer's shape, `weight_scale`,
    `act_scale`, `act_zero_point` (shapes as in `QuantLayer`) and `bias`, float32; the last two may be None.
    Inputs have `act_bits` bits. `pack` hands the weight to oneDNN, which lays it out anew; without it calls
    dequantize the weight. The state dict has the plain tensors in either case. `to` changes devices only.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        tensors: dict[str, Tensor],
        split: int | None,
        act_bits: int,
        state: QuantState,
    ) -> None:
        super().__init__()
        self.name, self.split, self.act_bits, self.state = name, split, act_bits, state
        for kind in TENSORS:
            self.register_buffer(kind, tensors.get(kind))
        self.shape = tuple(self.weight.shape)
        self._read_input_grids()
        self._packed: list = []

    def _read_input_grids(self) -> None:
        quantizer = UniformQuantizer(self.act_bits, symmetric=self.act_zero_point is None)
        self._input_grids = input_grids(self.act_scale, self.act_zero_point, quantizer)

    def _sizes(self) -> list[int]:
        """Input channels of a skip concatenation's halves, or of the whole input."""
        return [self.shape[1]] if self.split is None else [self.split, self.shape[1] - self.split]

    def _scales(self) -> list[Tensor]:
        """The weight scales of the halves, or of the whole weight, `(out,)` each."""
        scales = [self.weight_scale] if self.split is None else self.weight_scale
        return [scale.expand(self.shape[0]).contiguous() for scale in scales]

    def _pack(self, weight: Tensor, scale: Tensor) -> object:
        raise NotImplementedError

    def pack(self) -> None:
        """Lay the weight out for the integer kernels, unless it is already, and free the plain one."""
        if self._packed:
            return
        halves = self.weight.split(self._sizes(), dim=1)
        self._packed = [self._pack(w, s) for w, s in zip(halves, self._scales(), strict=True)]
        self.weight = None

    def integer_weight(self) -> Tensor:
        """The weight's integers, int8, in the original shape."""
        if not self._packed:
            return self.weight
        return torch.cat([half.weight() for half in self._packed], dim=1)

    def input_grids(self) -> list[InputGrid]:
        """The grids of the input in the current interval, one, or two with a split."""
        return calibrated_grids(self._input_grids, self.state.interval, self.name)

    def forward(
        self, x: Tensor, accumulate: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output in `dtype` (default: that of `x`).

        Packed layers add it to `accumulate`, in place, if that is given. Layers that are not packed ignore
        `accumulate` and `dtype`.
        """
        grids = self.input_grids()
        halves = x.split(self._sizes(), dim=self._channels) if self.split is not None else [x]
        if not self._packed:
            fakes = [fake_quantize(h, g.scale, g.high, g.low) for h, g in zip(halves, grids, strict=True)]
            weights = self.weight.split(self._sizes(), dim=1)
            broadcast = (-1, *[1] * (self.weight.dim() - 1))
            exact = [w * s.view(broadcast) for w, s in zip(weights, self._scales(), strict=True)]
            x, weight = torch.cat(fakes, self._channels), torch.cat(exact, 1).to(x.dtype)
            return self._float(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        integers = [self._prepare(half, grid) for half, grid in zip(halves, grids, strict=True)]
        return self.multiply(integers, dtype or x.dtype, accumulate)

    def multiply(self, halves: list[Tensor], dtype: torch.dtype, accumulate: Tensor | None = None) -> Tensor:
        """The output in `dtype` for an input, or its two halves, that are quantized already."""
        bias = self.bias
        for x, grid, packed in zip(halves, self.input_grids(), self._packed, strict=True):
            accumulate, bias = packed(x, grid, bias, dtype, accumulate), None
        return accumulate

    def quantize(self, x: Tensor) -> Tensor:
        """An unsplit input as the kernels take it."""
        return self._prepare(x, self.input_grids()[0])

    def _prepare(self, x: Tensor, grid: InputGrid) -> Tensor:
        return int8_kernels.quantize(x, grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Layer:
        if not self._packed:
            for name, tensor in self._buffers.items():
                if tensor is not None:
                    self._buffers[name] = tensor.to(fn(tensor).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.integer_weight()

    def _load_from_state_dict(self, *args: object) -> None:
        packed = bool(self._packed)
        self.weight, self._packed = self.integer_weight(), []
        super()._load_from_state_dict(*args)
        self._read_input_grids()
        if packed:
            self.pack()

    def extra_repr(self) -> str:
        split = "" if self.split is None else f", split={self.split}"
        how = "int8 kernels" if self._packed else "dequantized"
        return f"{self.shape}{split}, {self.act_bits}-bit inputs, {how}"


class Int8Linear(Int8Layer):
    """`nn.Linear` on int8 weights and inputs; the result has the input's type."""

    _channels = -1

    def _pack(self, weight: Tensor, scale: Tensor) -> int8_kernels.PrepackedLinear:
        return int8_kernels.PrepackedLinear(weight, scale)

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)


class Int8GatedLinear(Int8Linear):
    """An `Int8Linear` whose outputs are values, then gates. Packed, it is two layers: values and gates."""

    def pack(self) -> None:
        if not self._packed:
            both = zip(self.weight.chunk(2), self._scales()[0].chunk(2), strict=True)
            self._packed, self.weight = [self._pack(w, s) for w, s in both], None

    def integer_weight(self) -> Tensor:
        return torch.cat([packed.weight() for packed in self._packed]) if self._packed else self.weight

    def multiply(self, halves: list[Tensor], dtype: torch.dtype, accumulate: Tensor | None = None) -> Tensor:
        out = torch.cat([packed(*halves, *rest, dtype) for packed, *rest in self._values_and_gates()], dim=-1)
        return out if accumulate is None else accumulate.add_(out)

    def gated(self, x: Tensor) -> Tensor:
        """`value * gelu(gate)` in float32 for an input that is quantized already."""
        (value, *first), (gate, *second) = self._values_and_gates()
        return gate(x, *second, torch.float32, post_op="gelu").mul_(value(x, *first, torch.float32))

    def _values_and_gates(self) -> list[tuple]:
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        grid = self.input_grids()[0]
        return [(packed, grid, bias) for packed, bias in zip(self._packed, biases, strict=True)]


class Int8Conv2d(Int8Layer):
    """`nn.Conv2d` on int8 weights and inputs; the result has the input's type, channels last."""

    _channels = 1

    def __init__(self, layer: nn.Conv2d, *args: object) -> None:
        super().__init__(layer, *args)
        self._mode, self._pads = layer.padding_mode, layer._reversed_padding_repeated_twice
        self._stride, self._dilation, self._groups = layer.stride, layer.dilation, layer.groups
        # The kernels pad with zeros themselves, equally on opposite sides.
        self._inside = isinstance(layer.padding, tuple) and layer.padding_mode == "zeros"
        self._padding = layer.padding if self._inside else (0, 0)

    def _pack(self, weight: Tensor, scale: Tensor) -> int8_kernels.Prepacked:
        geometry = (self._stride, self._padding, self._dilation, self._groups)
        return int8_kernels.prepack_convolution(weight, scale, *geometry)

    def _pad(self, x: Tensor) -> Tensor:
        if self._inside:
            return x
        return F.pad(x, self._pads, mode="constant" if self._mode == "zeros" else self._mode)

    def _prepare(self, x: Tensor, grid: InputGrid) -> Tensor:
        return int8_kernels.quantize(self._pad(x).contiguous(memory_format=torch.channels_last), grid)

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry = (self._stride, self._padding, self._dilation, self._groups)
        return F.conv2d(self._pad(x), weight, bias, *geometry)
