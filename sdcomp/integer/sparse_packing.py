"""Weights with many zeros: n-bit codes of the others, and one bit a weight that says where they are.

The codes stand one after the other, row by row, packed like a matrix of one column. The mask is packed in the
same way. It has room for every pattern of zeros: the places of a 2:4 pattern, two bits for each weight that
stays, would take as many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdcomp.integer.bit_packing import Columns, pack, packed_shape, unpack


def mask_shape(shape: Sequence[int]) -> tuple[int]:
    """Return the shape of the packed mask of a weight: one bit an entry."""
    return (-(-prod(shape) // 8),)


def pays(shape: Sequence[int], kept: int, n_bits: int) -> bool:
    """Whether a weight is at least a tenth smaller if only its `kept` entries that are not zero are stored.

    Less than that is not worth the time that unpacking then takes.
    """
    sparse = prod(packed_shape((kept, 1), n_bits)) + prod(mask_shape(shape))
    return sparse <= 0.9 * prod(packed_shape(shape, n_bits))


def pack_sparse(codes: Tensor, kept: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Pack the codes, uint8 `(rows, columns)`, that the mask `kept` marks; returns them and the mask."""
    return pack(codes[kept][:, None], n_bits), pack(kept.byte().view(-1, 1), 1).flatten()


def unpack_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that was packed, bool in the given shape."""
    return unpack(mask.view(1, -1, 1), 1, prod(shape)).view(torch.bool).view(shape)


def matches_mask(packed: Tensor, mask: Tensor, n_bits: int) -> bool:
    """Whether there are as many packed codes as the packed mask marks."""
    kept = int(unpack_mask(mask, (8 * len(mask),)).count_nonzero())
    return tuple(packed.shape) == packed_shape((kept, 1), n_bits)


def unpack_sparse(packed: Tensor, kept: Tensor, n_bits: int) -> Tensor:
    """Return the codes, uint8 in the shape of the mask `kept`; 0 where it is not set."""
    codes = pad(unpack(packed, n_bits, packed.shape[1] * 8), (0, 0, 1, 0)).flatten()
    # Many times faster than a scatter by the mask: each entry looks up its own code, zeros look up the first.
    place = kept.flatten().cumsum(0, dtype=torch.int32).mul_(kept.flatten())
    return codes.index_select(0, place).view(kept.shape)


def dequantize_sparse(
    packed: Tensor, mask: Tensor, n_bits: int, grids: Sequence[Columns], out: Tensor
) -> Tensor:
    """Write scale * (code - zero), computed in float32, into `out` `(rows, columns)`, any floating type."""
    kept = unpack_mask(mask, out.shape)
    values = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    values.copy_(unpack_sparse(packed, kept, n_bits))
    for grid in grids:
        grid.subtract_zero(values).mul_(grid.scale[..., None])
    values.masked_fill_(~kept, 0)
    return values if values is out else out.copy_(values)
