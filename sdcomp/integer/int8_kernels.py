"""Integer convolutions and linear layers: the oneDNN operators that ship inside PyTorch."""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcomp.model.device import computes_bfloat16
from sdcomp.quantization.input_grids import InputGrid

ZERO = 128
"""The byte that stands for 0 in an input whose integers fit into a signed byte."""
_WIDE = 1024
"""A convolution with at least that many output channels is one matrix product. In SD 1.5 these see maps of
8x8 and 16x16, where that takes 0.3 and 0.9 of the time, and one of 32x32, where it takes as long."""


NARROW = 63
"""The largest weight of 7 bits."""


def zero_byte(grid: InputGrid) -> int:
    """Return the byte that stands for 0 in an input: the fast kernels take unsigned bytes."""
    return ZERO if grid.low >= -ZERO and grid.high < ZERO else int(-grid.low)


def quantize(x: Tensor, grid: InputGrid) -> Tensor:
    """Return the integers of `fake_quantize` plus `zero_byte`, uint8, in the memory format of `x`.

    NaN becomes the largest integer; see `Int8Model` for who looks for it.
    """
    if (zero := zero_byte(grid)) != ZERO:
        integers = (x.float() * (1 / grid.scale)).round_().clamp_(grid.low, grid.high)
        return integers.nan_to_num_(grid.high).add_(zero).to(torch.uint8)
    # Rounded around 0, since PyTorch adds another zero point before it rounds.
    quantized = torch.quantize_per_tensor(x.float(), grid.scale, 0, torch.qint8)
    # The same bytes, not the copy that `int_repr` makes.
    integers = torch.empty(0, dtype=torch.int8)
    integers.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
    # Flipping the sign bit adds 128.
    return integers.clamp_(int(grid.low), int(grid.high)).view(torch.uint8).bitwise_xor_(ZERO)


class Prepacked:
    """A weight as oneDNN lays it out, which never changes, so that copies can share it."""

    def __deepcopy__(self, memo: dict[int, object]) -> Prepacked:
        return self

    def __call__(
        self,
        x: Tensor,
        grid: InputGrid,
        bias: Tensor | None,
        dtype: torch.dtype,
        accumulate: Tensor | None = None,
        **post_op: str,
    ) -> Tensor:
        """Multiply uint8 inputs; the output has the type `dtype`.

        It is added to `accumulate`, of its type and shape, in place if that is given. `post_op="gelu"`, for
        linear layers without `accumulate`, applies the exact GELU to it. Where this CPU does not compute in
        bfloat16, the kernel writes float32, which is then rounded.
        """
        if dtype != torch.bfloat16 or computes_bfloat16():
            return self._multiply(x, grid, bias, dtype, accumulate, **post_op)
        out = self._multiply(x, grid, bias, torch.float32, None, **post_op)
        return out.to(dtype) if accumulate is None else accumulate.add_(out)


class PrepackedLinear(Prepacked):
    """An int8 weight `(out, in)` with its scales `(out,)`: `(..., in)` -> `(..., out)`."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.scale, self._zeros = scale, torch.zeros_like(scale, dtype=torch.int32)
        self._weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)

    def weight(self) -> Tensor:
        """The integers as they were given."""
        return self._weight.to_dense().t().contiguous()

    def _multiply(
        self,
        x: Tensor,
        grid: InputGrid,
        bias: Tensor | None,
        dtype: torch.dtype,
        accumulate: Tensor | None,
        post_op: str = "none",
    ) -> Tensor:
        sides = (x, grid.scale, zero_byte(grid), self._weight, self.scale, self._zeros)
        if accumulate is None:
            return torch.ops.onednn.qlinear_pointwise(*sides, bias, 1.0, 0, dtype, post_op, [], "none")
        return torch.ops.onednn.qlinear_pointwise.binary(
            *sides, accumulate, bias, 1.0, 0, dtype, 1.0, 0, "sum", 1.0, "none", [], ""
        )


class PrepackedConv2d(Prepacked):
    """An int8 weight `(out, in / groups, kh, kw)` with its scales `(out,)`.

    `(B, in, h, w)` -> `(B, out, h', w')`, channels last.
    """

    def __init__(self, weight: Tensor, scale: Tensor, *geometry: list[int] | int) -> None:
        self.scale, self._zeros = scale, torch.zeros_like(scale, dtype=torch.int32)
        self._geometry = geometry  # stride, padding, dilation, groups
        self._weight = torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, ZERO, *geometry, None)

    def weight(self) -> Tensor:
        """The integers as they were given."""
        return self._weight.to_dense()

    def _multiply(
        self, x: Tensor, grid: InputGrid, bias: Tensor | None, dtype: torch.dtype, accumulate: Tensor | None
    ) -> Tensor:
        sides = (x, grid.scale, zero_byte(grid), self._weight, self.scale, self._zeros)
        if accumulate is None:
            return torch.ops.onednn.qconv2d_pointwise(
                *sides, bias, *self._geometry, 1.0, 0, dtype, "none", [], ""
            )
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *sides, accumulate, bias, *self._geometry, 1.0, 0, dtype, 1.0, 0, "sum", 1.0, None, [], None
        )


class PrepackedConvAsMatmul(PrepackedLinear):
    """A convolution of stride 1 as one matrix product with the patches of its input (im2col).

    Shapes as in `PrepackedConv2d`.
    """

    def __init__(self, weight: Tensor, scale: Tensor, padding: tuple[int, int]) -> None:
        self._in, self._kernel, self._padding = weight.shape[1], weight.shape[2:], padding
        super().__init__(weight.permute(0, 2, 3, 1).flatten(1), scale)

    def weight(self) -> Tensor:
        """The integers as they were given."""
        return super().weight().unflatten(1, (*self._kernel, self._in)).permute(0, 3, 1, 2).contiguous()

    def _multiply(
        self, x: Tensor, grid: InputGrid, bias: Tensor | None, dtype: torch.dtype, accumulate: Tensor | None
    ) -> Tensor:
        (kh, kw), (ph, pw) = self._kernel, self._padding
        x = x.permute(0, 2, 3, 1)
        if ph or pw:
            x = F.pad(x, (0, 0, pw, pw, ph, ph), value=zero_byte(grid))
        if kh > 1 or kw > 1:
            x = x.unfold(1, kh, 1).unfold(2, kw, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
        accumulate = None if accumulate is None else accumulate.permute(0, 2, 3, 1)
        return super()._multiply(x, grid, bias, dtype, accumulate).permute(0, 3, 1, 2)


def prepack_convolution(
    weight: Tensor,
    scale: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> PrepackedConv2d | PrepackedConvAsMatmul:
    """Lay a weight out for the kernel that is the fastest for it."""
    plain = groups == 1 and stride == dilation == (1, 1)
    if plain and (weight.shape[2:] == (1, 1) or len(weight) >= _WIDE):
        return PrepackedConvAsMatmul(weight, scale, padding)
    return PrepackedConv2d(weight, scale, list(stride), list(padding), list(dilation), groups)


def missing(weight_max: int = 127) -> str | None:
    """Try the integer kernels; return why they cannot be used here, or None if they can.

    `weight_max`: the largest magnitude of the weights' integers.
    """
    if weight_max > NARROW and products_overflow():
        return "this CPU has no VNNI, so the int8 kernels need weights of at most 7 bits in every layer"
    return _failure(127 if weight_max > NARROW else NARROW)


def products_overflow() -> bool:
    """Whether products of 8-bit weights overflow here, and those of 7-bit weights do not.

    CPUs without VNNI add pairs of products in 16 bits.
    """
    return _failure(127) is not None and _failure(NARROW) is None


@functools.cache
def _failure(weight_max: int) -> str | None:
    """Return what goes wrong in a small case with weights up to `weight_max`, or None."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.5, 2.0, 1.0, 0.25])
    weight = torch.randint(-weight_max, weight_max + 1, (4, 8, 3, 3), generator=generator, dtype=torch.int8)
    bias, x = torch.ones(4), torch.randn(2, 8, 5, 5, generator=generator)
    # The largest sums: products of the largest values, all of one sign.
    weight[0], weight[1], x[0] = weight_max, -weight_max, 99
    narrow, exact = weight[:, :, 0, 0], weight.float() * scale.view(-1, 1, 1, 1)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # PyTorch announces that `quantize_per_tensor` will go some day; it says so once.
            warnings.simplefilter("ignore", UserWarning)
            grid = InputGrid(0.02, -127, 127)
            q = quantize(x, grid)
            x = (q.float() - ZERO) * 0.02
            tokens = x.permute(0, 2, 3, 1)
            conv, linear = (
                PrepackedConv2d(weight, scale, [2, 2], [1, 1], [1, 1], 1),
                PrepackedLinear(narrow, scale),
            )
            wrong = f"PyTorch {torch.__version__}'s integer operators give wrong results here"
            pixels, products = q.permute(0, 2, 3, 1), F.linear(tokens, exact[:, :, 0, 0])
            cases = [(conv, q, F.conv2d(x, exact, stride=2, padding=1)), (linear, pixels, products)]
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
                for packed, integers, product in cases:
                    got = packed(integers, grid, bias, dtype)
                    packed(integers, grid, None, dtype, accumulate=got)
                    wanted = 2 * product + 1
                    if got.dtype != dtype or (got - wanted).abs().max() > tolerance * wanted.abs().max():
                        return wrong
            got, wanted = linear(pixels, grid, bias, torch.float32, post_op="gelu"), F.gelu(products + 1)
            if (got - wanted).abs().max() > 1e-5 * wanted.abs().max():
                return wrong
            if not (torch.equal(conv.weight(), weight) and torch.equal(linear.weight(), narrow)):
                return f"PyTorch {torch.__version__} does not give packed weights back"
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        return f"PyTorch {torch.__version__} has no oneDNN integer operators for this machine ({line})"
    return None
