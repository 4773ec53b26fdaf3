"""Refuse models and layers whose inputs have no scales yet."""

from __future__ import annotations

from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization.input_grids import InputGrid


class NotCalibratedError(UserError, RuntimeError):
    """A layer must quantize its input, but has no scale for it."""


def require_calibrated(model: nn.Module, when: str) -> None:
    """Raise NotCalibratedError for a model whose inputs have no scales; `when` says when it needs them."""
    if not model.calibrated:
        raise NotCalibratedError(f"the activations have no scales yet: calibrate the model {when}")


def calibrated_grids(grids: list[list[InputGrid]], interval: int, layer: str) -> list[InputGrid]:
    """Return a layer's input grids in an interval. Raises NotCalibratedError, which names the layer."""
    if min(grid.scale for grid in grids[interval]) <= 0:
        where = f" in interval {interval}" if len(grids) > 1 else ""
        raise NotCalibratedError(
            f"layer {layer} has no scale for its input{where}: calibrate the model first, with prompts that"
            " make this layer run, or switch the activations off"
        )
    return grids[interval]
