"""Scales and zero points: how they follow from a range, and how precisely the scales of groups are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STORED = torch.float16
"""The type that the many scales of groups are rounded to. Packed files keep them and other tensors in it."""
_SMALLEST = 2.0**-126
"""Smaller scales have no finite reciprocal and become 1: the values are zeros then."""


class Grid(NamedTuple):
    """The values that a tensor is rounded to: `scale * (code - zero_point)`.

    Both are float32 in the shape that the granularity gives; a symmetric grid has no `zero_point`.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def grid_of_range(low: Tensor, high: Tensor, qmax: int, *, symmetric: bool, stored: bool) -> Grid:
    """Return the grid that covers ranges from `low` to `high`, float32 tensors of one shape.

    A symmetric grid, with integers up to `qmax`, covers the larger magnitude of both. An affine one, with
    codes from 0 to `qmax`, covers zero as well. With `stored` the scales are rounded to `STORED`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / qmax
    if stored:
        scale = as_stored(scale)
    scale = torch.where(scale > _SMALLEST, scale, 1.0)
    if symmetric:
        return Grid(scale)
    return Grid(scale, (-low / scale).round_().clamp_(0, qmax))


def as_stored(scale: Tensor) -> Tensor:
    """Round scales to `STORED`; the result has their own type. Scales too small for it become 0."""
    return scale.clamp(max=torch.finfo(STORED).max).to(STORED).to(scale)
