"""How calibrated layers round their inputs in each timestep interval."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdcomp.quantization.quantizer import UniformQuantizer


class InputGrid(NamedTuple):
    """How an input, or one half of it, is rounded: to multiples of `scale` from `low` to `high`."""

    scale: float
    low: float
    high: float


def input_grids(
    scales: Tensor | None, zero_points: Tensor | None, quantizer: UniformQuantizer | None
) -> list[list[InputGrid]]:
    """Read calibrated scales `(k,)` or `(k, 2)` as numbers, so that no call waits for a device."""
    if scales is None or scales.is_meta:
        return []
    scales = scales.view(len(scales), -1)
    zeros = torch.zeros_like(scales) if zero_points is None else zero_points.view_as(scales)
    rows = []
    for some, zero in zip(scales.tolist(), zeros.tolist(), strict=True):
        bounds = (quantizer.bounds(None if zero_points is None else z) for z in zero)
        rows.append([InputGrid(s, *ends) for s, ends in zip(some, bounds, strict=True)])
    return rows
