"""Uniform quantization: its integers, its scales and zero points, and its simulation in floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.quantization.ranges import NORM, channel_clips, search_ranges
from sdcomp.quantization.scales import Grid, grid_of_range
from sdcomp.settings import Whole, whole_number

BITS = Whole(2, 8)
"""The bits that a quantizer can have."""
SCALE_METHODS = ("max", "mse")
GRANULARITIES = ("tensor", "channel", "group", "token")

Number = float | Tensor


def fake_quantize(x: Tensor, scale: Number, high: Number, low: Number | None = None) -> Tensor:
    """Round `x` to integer multiples of `scale`, and clip the integers to `low` (default: -`high`) to `high`.

    The result has the type and memory format of `x`. It is bit for bit that of PyTorch's
    `fake_quantize_per_tensor_affine` and `_per_channel_affine` with zero point 0: the product with the
    float32 reciprocal of the scale is rounded half to even. All arguments are numbers, or tensors that
    broadcast with `x`. Infinite values are clipped. NaN stays NaN on every device; PyTorch's operator on
    CUDA turns it into a number. On CPUs PyTorch's operators also fill a mask for the gradient and take
    several times longer than these four passes.
    """
    low = -high if low is None else low
    integers = x.float() * (1 / scale)
    return integers.round_().clamp_(low, high).mul_(scale).to(x.dtype)


@dataclass(frozen=True)
class UniformQuantizer:
    """Rounds to 2^n equally spaced values (affine), or to the 2^n - 1 of them that lie around zero.

    A symmetric grid has the integers from -(2^(n-1) - 1) to 2^(n-1) - 1. An affine grid has the codes from
    0 to 2^n - 1; its `zero_point` is the code of zero, so zero is exact in both. Affine grids fit inputs
    after SiLU and GELU, which reach far up and hardly below zero (Jacob et al. 2018, equation 1).

    `granularity`: one scale for the whole "tensor"; for each "channel", a slice along the first dimension;
    for each "group" of `group_size` consecutive columns of a weight as a matrix `(out, columns)`; or for
    each "token", a slice along the last dimension. Token scales are for inputs, and each call finds them
    anew.

    `scale_method`: "max" covers all values. "mse" takes the range with the least L_p error, p = `norm`.
    Where everything is zero the scale is 1.

    Raises ValueError for bits out of 2 to 8, another granularity or method, a group or a norm below 1;
    TypeError for another type.
    """

    n_bits: int = 8
    granularity: str = "tensor"
    symmetric: bool = True
    scale_method: str = "max"
    group_size: int = 64
    norm: float = NORM

    def __post_init__(self) -> None:
        for name in ("n_bits", "group_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if not BITS.low <= self.n_bits <= BITS.high:
            raise ValueError(f"n_bits must be {BITS.low} to {BITS.high}, not {self.n_bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be True or False, not {self.symmetric!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, not {self.granularity!r}")
        if self.scale_method not in SCALE_METHODS:
            raise ValueError(f"scale_method must be 'max' or 'mse', not {self.scale_method!r}")
        if isinstance(self.norm, bool) or not isinstance(self.norm, int | float) or not 1 <= self.norm <= 16:
            raise ValueError(f"norm must be a number from 1 to 16, not {self.norm!r}")

    @property
    def channel_wise(self) -> bool:
        """Whether each slice along the first dimension has scales of its own."""
        return self.granularity in ("channel", "group")

    @property
    def qmax(self) -> int:
        """The largest integer of a symmetric grid, the largest code of an affine one."""
        return 2 ** (self.n_bits - 1) - 1 if self.symmetric else 2**self.n_bits - 1

    @property
    def integer_dtype(self) -> torch.dtype:
        """The type that holds multiples of the scale: int8, or int16 for affine grids of 8 bits."""
        return torch.int8 if self.symmetric or self.n_bits < 8 else torch.int16

    @torch.no_grad()
    def grid(self, x: Tensor) -> Grid:
        """Find the grid of a tensor.

        The shape of its scales: `(1,)` per tensor, `(channels,)`, `(channels, groups)`, or that of `x` with
        a last dimension of 1 per token. Raises UserError for values that are not finite.
        """
        rows = self._rows(x).float()
        if not rows.is_meta and not rows.isfinite().all():
            raise UserError("a tensor with NaN or infinite values has no scale: find where they come from")
        grid = self.grid_of_range(*self._ranges(rows))
        shape = (*x.shape[:-1], 1) if self.granularity == "token" else None
        if self.granularity == "group":
            shape = (len(x), -1)
        return grid if shape is None else Grid(*(g if g is None else g.view(shape) for g in grid))

    def grid_of_range(self, low: Tensor, high: Tensor) -> Grid:
        """Return the grid that covers ranges from `low` to `high`, float32 tensors of one shape.

        The many scales of groups are rounded to `STORED`; see `sdcomp.quantization.scales`.
        """
        return grid_of_range(
            low, high, self.qmax, symmetric=self.symmetric, stored=self.granularity == "group"
        )

    def bounds(self, zero_point: Number | None) -> tuple[Number, Number]:
        """Return the lowest and the highest multiple of the scale that a grid holds."""
        return (-self.qmax, self.qmax) if zero_point is None else (-zero_point, self.qmax - zero_point)

    def integers(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the multiples of the scale that `x` is rounded to: int8, or int16 for 8 bits and affine."""
        scale, low, high = self.broadcast_grid(x, grid)
        integers = (x.float() * (1 / scale)).round_().clamp_(low, high)
        return integers.to(self.integer_dtype)

    def dequantize(self, integers: Tensor, grid: Grid) -> Tensor:
        """Return multiples of the scale as float32 values."""
        return integers.float() * self.broadcast_grid(integers, grid)[0]

    def simulate(self, x: Tensor, grid: Grid) -> Tensor:
        """Round `x` to its grid; the result has the type and memory format of `x`."""
        scale, low, high = self.broadcast_grid(x, grid)
        return fake_quantize(x, scale, high, low)

    def __call__(self, x: Tensor) -> Tensor:
        """Round a tensor to the grid found for it."""
        return self.simulate(x, self.grid(x))

    def _rows(self, x: Tensor) -> Tensor:
        """The values that share a scale, as rows; the last group of a channel is filled up with zeros."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if self.granularity == "token":
            return x.reshape(-1, x.shape[-1])
        if self.granularity == "channel":
            return x.flatten(1)
        matrix = x.flatten(1)
        missing = -matrix.shape[1] % self.group_size
        return torch.nn.functional.pad(matrix, (0, missing)).view(-1, self.group_size)

    def _ranges(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The range of each row, as two tensors `(rows,)`."""
        if not rows.shape[1]:
            empty = rows.new_zeros(len(rows))
            return empty, empty
        if self.symmetric and not (self.scale_method == "mse" and self.granularity == "group"):
            magnitudes = rows.abs()
            mse = self.scale_method == "mse"
            clip = channel_clips(magnitudes, self.qmax, self.norm) if mse else magnitudes.amax(dim=1)
            return -clip, clip
        low, high = rows.aminmax(dim=1)
        if self.scale_method == "max":
            return low, high
        return search_ranges(rows, low, high, self._simulate_range, self.norm)

    def _simulate_range(self, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = (g if g is None else g[:, None] for g in self.grid_of_range(low, high))
        low, high = self.bounds(zero_point)
        return fake_quantize(rows, scale, high, low)

    def broadcast_grid(self, x: Tensor, grid: Grid) -> tuple[Tensor, Number, Number]:
        """Scale and bounds, each a number or in a shape that broadcasts with `x`."""
        scale, zero_point = (g if g is None else self._broadcast(x, g) for g in grid)
        return scale, *self.bounds(zero_point)

    def _broadcast(self, x: Tensor, values: Tensor) -> Tensor:
        if self.granularity == "token":
            return values
        if self.granularity == "group":
            columns = x[0].numel()
            return values.repeat_interleave(self.group_size, 1)[:, :columns].reshape(x.shape)
        return values.view(-1, *[1] * (x.dim() - 1))


class UniformSymmetricQuantizer(UniformQuantizer):
    """Integers from -(2^(n-1) - 1) to 2^(n-1) - 1, the same step everywhere, zero exact.

    The scale (the step) is the clipping range divided by the largest integer. `scale_method="max"` takes
    the largest magnitude as the range, "mse" the range with the least L_p error, p = 2.4, found from a
    histogram. With `channel_wise`, each slice along the first dimension has its own.

    Raises what `UniformQuantizer` raises.
    """

    def __init__(self, n_bits: int = 8, channel_wise: bool = False, scale_method: str = "max") -> None:
        if not isinstance(channel_wise, bool):
            raise TypeError(f"channel_wise must be True or False, not {channel_wise!r}")
        super().__init__(n_bits, "channel" if channel_wise else "tensor", scale_method=scale_method)

    def scale(self, x: Tensor) -> Tensor:
        """Find the scales of a tensor: float32, `(channels,)` if channel-wise, else `(1,)`.

        Raises UserError for values that are not finite.
        """
        return self.grid(x).scale

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the integers of a tensor at the given scales, int8."""
        return self.integers(x, Grid(scale))

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return integers times scales, in the type and memory format of `x`."""
        return self.simulate(x, Grid(scale))
