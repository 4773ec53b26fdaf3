"""What the quantized layers of one model share: switches, the timestep's interval, the last input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdcomp.moments import LastInput
from sdcomp.quantization.input_grids import InputGrid
from sdcomp.quantization.quantizer import fake_quantize


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
