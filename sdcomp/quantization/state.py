"""What the quantized layers of one model share, and how each rounds its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.moments import LastInput
from sdcomp.quantization.quantizer import UniformQuantizer, fake_quantize


class NotCalibratedError(UserError, RuntimeError):
    """A layer must quantize its input, but has no scale for it."""


class InputGrid(NamedTuple):
    """How an input, or one half of it, is rounded: to multiples of `scale` from `low` to `high`."""

    scale: float
    low: float
    high: float


@dataclass(eq=False)
class QuantState:
    """What the quantized layers of one model share: switches, the timestep's interval, the last input.

    `only`: the name of the one layer that is quantized, or None for all layers. `observer(layer, input)` is
    set during a calibration: it sees each layer's input, and returns the grids to round it to, one for each
    half, or None to leave it as it is. `operands(layer, input)` is set during training: it returns the input
    and the weight to multiply.
    """

    weights: bool = True
    activations: bool = True
    only: str | None = None
    interval: int = 0
    timestep: float = 0.0
    observer: Callable[[nn.Module, Tensor], list[InputGrid] | None] | None = None
    operands: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] | None = None
    _last: LastInput = field(default_factory=LastInput, init=False, repr=False)

    def quantize(self, x: Tensor, grids: list[InputGrid], split: int | None) -> Tensor:
        """Round an input. Queries, keys and values share the copy that is made for the first of them."""
        key = (*grids, split)
        made = self._last.get(x, key)
        if made is None:
            halves = [x] if split is None else x.tensor_split([split], dim=1)
            made = [fake_quantize(h, g.scale, g.high, g.low) for h, g in zip(halves, grids, strict=True)]
            made = made[0] if split is None else torch.cat(made, dim=1)
            self._last.keep(x, key, made)
        return made

    def forget(self) -> None:
        """Let go of the last input."""
        self._last.clear()


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    A side without a quantizer stays in full precision. `intervals`: how many timestep intervals have their
    own input grid. `split`: the input channels of the first half of a skip concatenation whose halves have
    their own grids, else None.
    """

    weight_quantizer: UniformQuantizer | None
    act_quantizer: UniformQuantizer | None
    intervals: int = 1
    split: int | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the input's grid comes from a calibration; that of each token is found at each call."""
        return self.act_quantizer is not None and self.act_quantizer.granularity != "token"


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


def calibrated(grids: list[list[InputGrid]], interval: int, layer: str) -> list[InputGrid]:
    """Return a layer's input grids in an interval. Raises NotCalibratedError, which names the layer."""
    if min(grid.scale for grid in grids[interval]) <= 0:
        where = f" in interval {interval}" if len(grids) > 1 else ""
        raise NotCalibratedError(
            f"layer {layer} has no scale for its input{where}: calibrate the model first, with prompts that"
            " make this layer run, or switch the activations off"
        )
    return grids[interval]
