"""What the quantized layers of one model share: switches, the timestep's interval, the last input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.quantization.input_grids import InputGrid
from sdcomp.quantization.quantizer import fake_quantize


class LastInput:
    """Remembers one value that was computed from the last input.

    Queries, keys and values read the same tensor, one after the other. `get` returns None unless the tensor
    is the same object, was not changed since, and `key` is the same too.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, object, object] | None = None

    def get(self, x: Tensor, key: object = None) -> object | None:
        """Return the value kept for this tensor and key, or None."""
        if self._kept is None or x.is_inference():
            return None
        before, version, kept_key, value = self._kept
        return value if before is x and version == x._version and kept_key == key else None

    def keep(self, x: Tensor, key: object, value: object) -> None:
        """Keep a value. Inference tensors do not count their changes, so nothing is kept for them."""
        self._kept = None if x.is_inference() else (x, x._version, key, value)

    def clear(self) -> None:
        """Forget the last input."""
        self._kept = None


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

    def refuse_training(self, what: str) -> None:
        """Raise UserError for a model in training, whose learned scales `what` would leave out."""
        if self.operands is not None:
            raise UserError(f"{what} needs a model whose training has ended: call rounded() first")

    def forget(self) -> None:
        """Let go of the last input."""
        self._last.clear()
