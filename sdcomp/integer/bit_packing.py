"""Integers of 1 to 8 bits side by side in bytes.

A matrix of codes is packed down its rows, not along them. Its rows are cut into segments of equal height,
and the codes at one place of all segments share a block of bytes: 2 codes of 4 bits in one byte, 8 codes of
3 bits in 3 bytes. Code i of a block has its bits i n to i n + n - 1, counted from the lowest bit of the first
byte. A few operations on bytes then unpack a whole segment, with nothing to interleave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

WIDTHS = range(1, 9)
"""The bits of a code that can be packed; masks take 1."""
_CHUNK = 2**19
"""Codes that are unpacked at a time on a CPU, so that all passes but the first find them in the cache."""


class Columns(NamedTuple):
    """Neighbouring columns of a weight as a matrix, in groups of equal width, and the grids of the groups.

    `columns`: which ones. `scale`: `(rows, groups)`, any floating type. `zero`: the code of zero, a number
    or `(rows, groups)`.
    """

    columns: slice
    scale: Tensor
    zero: Tensor | int

    def map(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """Return the columns with a function applied to their scales and zeros."""
        return Columns(self.columns, *(t if isinstance(t, int) else function(t) for t in self[1:]))

    def subtract_zero(self, codes: Tensor) -> Tensor:
        """Subtract the code of zero in place; returns a view of the groups, `(..., groups, width)`."""
        groups = codes[..., self.columns].unflatten(-1, (self.scale.shape[-1], -1))
        return groups.sub_(self.zero if isinstance(self.zero, int) else self.zero[..., None])


def block(n_bits: int) -> tuple[int, int]:
    """Return how many codes share a block, and how many bytes it has.

    Raises ValueError for codes of another width than `WIDTHS`, and so do all functions of this file.
    """
    if n_bits not in WIDTHS:
        raise ValueError(f"codes of {n_bits} bits cannot be packed, only of {WIDTHS[0]} to {WIDTHS[-1]}")
    common = gcd(n_bits, 8)
    return 8 // common, n_bits // common


def packed_shape(shape: Sequence[int], n_bits: int) -> tuple[int, int, int]:
    """Return the shape of a packed weight `(out, ...)`: bytes of a block, rows of a segment, columns."""
    codes, size = block(n_bits)
    return size, -(-shape[0] // codes), prod(shape[1:])


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack codes from 0 to 2^n - 1, uint8 `(rows, columns)`, into bytes, uint8 in `packed_shape`."""
    count, _ = block(n_bits)
    shape = packed_shape(codes.shape, n_bits)
    packed = codes.new_zeros(shape)
    filled = pad(codes, (0, 0, 0, count * shape[1] - len(codes)))
    for i, segment in enumerate(filled.split(shape[1])):
        byte, shift = divmod(i * n_bits, 8)
        packed[byte] |= segment << shift
        if shift + n_bits > 8:
            packed[byte + 1] |= segment >> (8 - shift)
    return packed


def unpack(packed: Tensor, n_bits: int, rows: int) -> Tensor:
    """Return the codes that were packed, uint8 `(rows, columns)`."""
    codes = packed.new_empty(block(n_bits)[0], *packed.shape[1:])
    return _unpack(packed, n_bits, codes).flatten(0, 1)[:rows]


def dequantize(packed: Tensor, n_bits: int, grids: Sequence[Columns], out: Tensor) -> Tensor:
    """Write scale * (code - zero), computed in float32, into `out`; returns its rows that were packed.

    `out`: `(rows, columns)` in any floating type, with rows for all segments at their full height.
    """
    count, (height, columns), rows = block(n_bits)[0], packed.shape[1:], len(grids[0].scale)

    def fold(values: Tensor) -> Tensor:
        missing = count * height - rows
        return (pad(values, (0, 0, 0, missing)) if missing else values).reshape(count, height, -1)

    folded, grids = out.view(count, height, columns), [grid.map(fold) for grid in grids]
    chunk = max(1, _CHUNK // (count * columns)) if packed.device.type == "cpu" else height
    codes = packed.new_empty(count, min(chunk, height), columns)
    exact = None if out.dtype == torch.float32 else torch.empty_like(codes, dtype=torch.float32)
    for start in range(0, height, chunk):
        some = slice(start, start + chunk)
        part = folded[:, some]
        values = part if exact is None else exact[:, : part.shape[1]]
        values.copy_(_unpack(packed[:, some], n_bits, codes[:, : part.shape[1]]))
        for grid in (grid.map(lambda t, some=some: t[:, some]) for grid in grids):
            grid.subtract_zero(values).mul_(grid.scale[..., None])
        if values is not part:
            part.copy_(values)
    return out[:rows]


def _unpack(packed: Tensor, n_bits: int, codes: Tensor) -> Tensor:
    """Unpack into `codes`, `(segments, height, columns)`; returns it."""
    for i, segment in enumerate(codes):
        byte, shift = divmod(i * n_bits, 8)
        torch.bitwise_right_shift(packed[byte], shift, out=segment)
        if shift + n_bits > 8:
            segment |= packed[byte + 1] << (8 - shift)
    return codes.bitwise_and_(2**n_bits - 1)
