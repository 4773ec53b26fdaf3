"""Second-order pruning of one layer: set weights to zero, correct those that stay (SparseGPT).

Rules for `sdcomp.second_order.sweep` say which weights of a column become zero. With `quantize` a rule also
rounds the weights that stay: one sweep prunes and rounds, and later columns take up the error of both
(Frantar & Alistarh 2023, section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdcomp.observation import weight_matrix
from sdcomp.second_order import inverse_factor, sweep

Quantize = Callable[[Tensor, int], Tensor]
"""Rounds a column `(out,)` of the weight matrix, given its index."""


class MaskRule:
    """Zeroes the weights that `mask` `(out, columns)` marks."""

    def __init__(self, mask: Tensor | None = None, quantize: Quantize | None = None) -> None:
        self.mask, self.start, self.quantize = mask, 0, quantize

    def begin(self, block: Tensor, cost: Tensor, start: int) -> None:
        """Choose the mask of a block of columns; here it is known."""

    def column(self, values: Tensor, index: int) -> Tensor:
        """Round a column and zero what the mask marks."""
        kept = values if self.quantize is None else self.quantize(values, index)
        return kept.masked_fill(self.mask[:, index - self.start], 0)


class ShareRule(MaskRule):
    """Zeroes the share `amount` of each block of columns that costs least (SparseGPT, section 3.3).

    The shares of all blocks add up to exactly round(amount * count) weights.
    """

    def __init__(self, amount: float, quantize: Quantize | None = None) -> None:
        super().__init__(quantize=quantize)
        self.amount = amount

    def begin(self, block: Tensor, cost: Tensor, start: int) -> None:
        """Choose the weights of this block."""
        rows, columns = block.shape
        count = round(self.amount * rows * (start + columns)) - round(self.amount * rows * start)
        mask = torch.zeros(cost.numel(), dtype=torch.bool, device=cost.device)
        mask[cost.flatten().argsort(stable=True)[:count]] = True
        self.mask, self.start = mask.view(cost.shape), start


class PatternRule(MaskRule):
    """Keeps `n` of every `m` consecutive weights of a row: those that cost most when their turn comes.

    `diagonal` is of the `inverse_factor` that the sweep uses. The sweep's blocks must be multiples of m.
    """

    def __init__(self, n: int, m: int, diagonal: Tensor, quantize: Quantize | None = None) -> None:
        super().__init__(quantize=quantize)
        self.n, self.m, self.diagonal = n, m, diagonal

    def begin(self, block: Tensor, cost: Tensor, start: int) -> None:
        """Keep the block, which the sweep updates in place."""
        self.block, self.first = block, start

    def column(self, values: Tensor, index: int) -> Tensor:
        """Choose the mask of m columns at the first of them, after all corrections so far."""
        if index % self.m == 0:
            here = slice(index - self.first, index - self.first + self.m)
            cost = (self.block[:, here] / self.diagonal[index : index + self.m]).square()
            order = cost.argsort(dim=1, stable=True)[:, : self.m - self.n]
            self.mask, self.start = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, order, True), index
        return super().column(values, index)


@torch.no_grad()
def prune_layer(
    layer: nn.Conv2d | nn.Linear,
    moments: Tensor,
    rule: MaskRule | Callable[[Tensor], MaskRule],
    *,
    order: Tensor | None = None,
    damping: float = 0.01,
) -> Tensor:
    """Sweep over the weight of a layer, in place; returns the squared error of each output, `(out,)`.

    `rule` may be a function of the diagonal of the inverse factor. The sweep visits the columns in `order`,
    if given. The error is the diagonal of D H D^T for the change D and `moments` H.
    """
    before = weight_matrix(layer).float()
    if order is not None:
        before, moments = before[:, order], moments[order][:, order]
    factor = inverse_factor(moments, damping)
    if not isinstance(rule, MaskRule):
        rule = rule(factor.diagonal())
    after = sweep(before, factor, rule)
    change = after - before
    if order is not None:
        after = torch.empty_like(after).index_copy_(1, order, after)
    layer.weight.copy_(after.view(layer.weight.shape))
    return (change @ moments).mul_(change).sum(1)
