"""Convolutions and linear layers that hold n-bit weights and unpack them when they run."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from sdcomp.integer.bit_packing import Columns, block, dequantize, pack, unpack
from sdcomp.integer.sparse_packing import dequantize_sparse, pack_sparse, pays, unpack_mask, unpack_sparse
from sdcomp.model.layers import is_recorded, linear
from sdcomp.model.rebuild import normal_tensors
from sdcomp.quantization.layer_base import QuantizedLayer
from sdcomp.quantization.layer_specs import LayerSpec
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.scales import Grid
from sdcomp.quantization.shared_state import QuantState

TENSORS = (
    "packed_weight",
    "weight_mask",
    "weight_scale",
    "weight_zero_point",
    "act_scale",
    "act_zero_point",
    "branch_down",
    "branch_up",
    "bias",
)
"""The tensors of an n-bit layer."""


class Workspace:
    """Memory for one dense weight, which the layers of a model write in turn.

    On a CPU it is kept from layer to layer: the system hands out fresh memory page by page, which takes
    several times longer than unpacking does.
    """

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized matrix, valid until the next one is asked for."""
        if device.type != "cpu" or is_recorded():
            return torch.empty(rows, columns, dtype=dtype, device=device)
        size = rows * columns * dtype.itemsize
        if self._bytes is None or len(self._bytes) < size:
            with normal_tensors():
                self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(rows, columns)

    def clear(self) -> None:
        """Free the memory."""
        self._bytes = None

    def __deepcopy__(self, memo: dict[int, object]) -> Workspace:
        return Workspace()


class NBitLayer(QuantizedLayer):
    """What `NBitConv2d` and `NBitLinear` have in common.

    Made of a layer (for its geometry), of `spec` and of tensors: `packed_weight`, see
    `sdcomp.integer.bit_packing`; `weight_mask`, for a weight whose zeros are left out, see
    `sdcomp.integer.sparse_packing`; `weight_scale` and `weight_zero_point` (uint8), `act_scale`,
    `act_zero_point`, `branch_down` and `branch_up`, in the shapes that they have in `QuantLayer`; `bias`.
    Scales and branches are float16 where a file has them so. Tensors that the spec does not need are None.
    `shape`: the shape of the dense weight.
    `to` changes the type of the bias alone.
    """

    packed_weight: Tensor
    weight_mask: Tensor | None
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def _fill(
        self,
        name: str,
        spec: LayerSpec,
        tensors: dict[str, Tensor | None],
        state: QuantState,
        workspace: Workspace,
    ) -> None:
        """Take over the tensors, in place of those that the constructor of the layer made."""
        self.name, self.spec, self.state, self._workspace = name, spec, state, workspace
        self.shape = tuple(self.weight.shape)
        del self.weight
        for kind in TENSORS[:-1]:
            self.register_buffer(kind, tensors.get(kind))
        if self.bias is not None:
            self.bias = nn.Parameter(tensors["bias"], requires_grad=False)
        self._read_input_grids()

    def integer_weight(self) -> Tensor:
        """Return the weight as multiples of its scale, as `QuantLayer.integer_weight` does."""
        packed, n_bits, kept = self.packed_weight, self.weight_quantizer.n_bits, None
        if self.weight_mask is None:
            integers = unpack(packed, n_bits, self.shape[0]).short()
        else:
            kept = unpack_mask(self.weight_mask, self._matrix_shape)
            integers = unpack_sparse(packed, kept, n_bits).short()
        for grid in self._grids():
            grid.subtract_zero(integers)
        if kept is not None:
            integers.mul_(kept)
        return integers.to(self.weight_quantizer.integer_dtype).view(self.shape)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight; it is valid until another layer of the model unpacks its own."""
        packed, mask, n_bits = self.packed_weight, self.weight_mask, self.weight_quantizer.n_bits
        rows, columns = self._matrix_shape
        if mask is None:
            rows = block(n_bits)[0] * packed.shape[1]
        out = self._workspace.matrix(rows, columns, dtype, packed.device)
        if mask is None:
            return dequantize(packed, n_bits, self._grids(), out).view(self.shape)
        return dequantize_sparse(packed, mask, n_bits, self._grids(), out).view(self.shape)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], prod(self.shape[1:])

    def _grids(self) -> list[Columns]:
        """The grids of the weight as a matrix `(out, columns)`, whose last group may be narrower."""
        width, size = self._matrix_shape[1], self.weight_quantizer.group_size
        border, groups = width, 1
        if self.split is not None:
            border = self.split * prod(self.shape[2:])
        elif self.weight_quantizer.granularity == "group":
            border, groups = width // size * size, width // size
        scale, zero = self._by_group(self.weight_scale), self.weight_quantizer.qmax
        zeros = None if self.weight_zero_point is None else self._by_group(self.weight_zero_point)
        sides = ((slice(0, border), slice(0, groups)), (slice(border, width), slice(groups, None)))
        return [
            Columns(columns, scale[:, some], zero if zeros is None else zeros[:, some])
            for columns, some in sides
            if columns.start < columns.stop
        ]

    def _by_group(self, values: Tensor) -> Tensor:
        """Scales or zero points as `(out, groups)`."""
        values = values if self.split is None else values.T
        return values.reshape(len(values), -1).expand(self.shape[0], -1)

    def _round(self, x: Tensor) -> Tensor:
        """The input, rounded as the spec says."""
        if self.act_quantizer is None:
            return x
        if self.spec.calibrated:
            return self.state.quantize(x, self.input_grids(), self.split)
        return self._round_tokens(x)

    def extra_repr(self) -> str:
        """Shape, and how the layer is quantized."""
        return f"{self.shape}{'' if self.weight_mask is None else ', zeros left out'}, {self.spec}"


class NBitConv2d(NBitLayer, nn.Conv2d):
    """`nn.Conv2d` with an n-bit weight; see `NBitLayer`."""

    def __init__(self, layer: nn.Conv2d, *args: object) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
        self._fill(*args)

    def forward(self, x: Tensor) -> Tensor:
        rounded = self._round(x)
        return self._plus_branch(self._conv_forward(rounded, self.dense_weight(x.dtype), self.bias), x)


class NBitLinear(NBitLayer, nn.Linear):
    """`nn.Linear` with an n-bit weight; see `NBitLayer`."""

    def __init__(self, layer: nn.Linear, *args: object) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self._fill(*args)

    def forward(self, x: Tensor) -> Tensor:
        rounded = self._round(x)
        return self._plus_branch(linear(rounded, self.dense_weight(x.dtype), self.bias), x)


def nbit_layer(layer: nn.Module, *args: object) -> NBitLayer:
    """Make the n-bit twin of a convolution or linear layer; the arguments are those of `NBitLayer._fill`."""
    return (NBitConv2d if isinstance(layer, nn.Conv2d) else NBitLinear)(layer, *args)


def pack_weight(layer: QuantLayer) -> dict[str, Tensor | None]:
    """Return the tensors of a quantized layer as an n-bit layer takes them, on the same device.

    Zeros are left out where that `pays`.
    """
    quantizer = layer.weight_quantizer

    def codes(integers: Tensor, grid: Grid) -> Tensor:
        lowest = quantizer.broadcast_grid(integers, grid)[1]
        return (integers.short() - lowest).to(torch.uint8)

    integers, n_bits = layer.integer_weight(), quantizer.n_bits
    matrix, kept, mask = layer.per_half(codes, integers).flatten(1), (integers != 0).flatten(1), None
    if pays(matrix.shape, int(kept.count_nonzero()), n_bits):
        packed, mask = pack_sparse(matrix, kept, n_bits)
    else:
        packed = pack(matrix, n_bits)
    # Copies: a new calibration of the simulation does not change the packed model.
    rest = {
        kind: None if (tensor := getattr(layer, kind)) is None else tensor.detach().clone()
        for kind in TENSORS[2:]
    }
    if rest["weight_zero_point"] is not None:
        rest["weight_zero_point"] = rest["weight_zero_point"].to(torch.uint8)
    return {"packed_weight": packed, "weight_mask": mask, **rest}
