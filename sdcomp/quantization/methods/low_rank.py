"""A low-rank branch beside a layer: SVDQuant (Li et al. 2025), without its smoothing.

A weight matrix W is U S V^T. The branch computes L = U_r S_r V_r^T, its part of rank r, in 16 bits from the
input as it is; W - L alone is rounded, and sees the rounded input. Of all matrices of this rank, L leaves the
smallest W - L, and the error of a rounded input is proportional to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.moments import weight_matrix
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.methods.second_order import SecondOrderRounding
from sdcomp.settings import whole_number


@dataclass(frozen=True)
class LowRankBranch:
    """Gives layers of fewer than 8 bits a branch of rank `rank`; `rounding` rounds the rest of each weight.

    The branch of a layer adds `rank * (out + columns)` float16 numbers, and as many multiply-accumulates for
    each position. The zeros of a pruned layer are not kept. Raises TypeError for a rank that is no whole
    number, and ValueError for one below 1.
    """

    rank: int = 16
    rounding: SecondOrderRounding = field(default_factory=SecondOrderRounding)

    def __post_init__(self) -> None:
        if whole_number("rank", self.rank) < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")

    @property
    def rows(self) -> int:
        """The rows that the rounding needs, see `Method`."""
        return self.rounding.rows

    def __call__(self, layer: QuantLayer, moments: Tensor) -> None:
        """Give a layer its branch and its rounded weight; `moments` is H, `(columns, columns)`."""
        if layer.weight_quantizer.n_bits < 8:
            u, s, v = torch.linalg.svd(weight_matrix(layer).float(), full_matrices=False)
            root = s[: self.rank].sqrt()
            layer.set_branch(root[:, None] * v[: self.rank], u[:, : self.rank] * root)
        self.rounding(layer, moments)


def refuse_branches(model: nn.Module, what: str) -> None:
    """Raise UserError if a layer of the model has a low-rank branch; `what` does not take these."""
    for layer in model.quantized_layers():
        if layer.branch_up is not None:
            raise UserError(
                f"{what} takes no low-rank branches, and layer {layer.name} has one: use the simulation, or"
                " pack the weights"
            )
