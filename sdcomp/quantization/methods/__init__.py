"""Methods that change the layers of a calibrated model: one file for each, with its paper."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.methods.low_rank import LowRankBranch, refuse_branches
from sdcomp.quantization.methods.second_order import SecondOrderRounding

__all__ = ["LowRankBranch", "Method", "SecondOrderRounding", "refuse_branches"]


class Method(Protocol):
    """A method of a `Recipe`. Its `repr` names all its settings, as a dataclass's does."""

    @property
    def rows(self) -> int:
        """How many inputs of a layer each call of the model contributes to the second moments."""

    def __call__(self, layer: QuantLayer, moments: Tensor) -> None:
        """Change a layer, in place; `moments` are those of its inputs, `(columns, columns)` float32."""
