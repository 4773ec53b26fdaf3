"""The column sweep of second-order compression: change one column of a weight matrix, correct the others.

Let H = mean of x x^T over the rows x that a weight matrix W multiplies. Then the squared error of the
output is tr(D H D^T) for a change D of W. Optimal Brain Surgeon (Hassibi & Stork 1993, equation 5) changes
one weight and moves all others to where this error is least. GPTQ (Frantar et al. 2023, algorithm 1) and
SparseGPT (Frantar & Alistarh 2023, algorithm 1) do this for all rows of W at once, column by column: the
columns after a changed column compensate for its error. Afterwards each column can be chosen once more, given
all the others: coordinate descent (QuantEase, Behdin et al. 2023, algorithm 1).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sdcomp.errors import UserError

DAMPING = 0.01
"""What second-order methods add to the diagonal of H, as a share of its mean, unless told otherwise."""


class ColumnRule(Protocol):
    """Decides what the columns become. Quantizers round them, pruners zero some of their entries."""

    def begin(self, block: Tensor, cost: Tensor, start: int) -> None:
        """See a block of columns, `(out, b)`, before its first one is changed; `start` is its index.

        `cost`, of the same shape, is the squared output error of setting each weight alone to zero (up to
        a factor 1/2), after the weights behind it were corrected.
        """

    def column(self, values: Tensor, index: int) -> Tensor:
        """Return what a column `(out,)` becomes."""


def inverse_factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, float32.

    `moments` is H, `(columns, columns)`. With J the reversal of rows, J H J = L L^T (Cholesky) gives H = R
    R^T for the upper triangular R = J L J, so U = R^-1. A diagonal that damping leaves at zero becomes 1: it
    belongs to an input that is always zero, whose weights do not matter.

    Raises UserError where H is not positive definite even with damping.
    """
    h = moments.float().flip(0, 1).contiguous()
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise UserError(
            "second moments are not positive definite: gather them from more inputs, or raise damping"
        )
    upper = factor.flip(0, 1).contiguous()
    eye = torch.eye(len(upper), device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


@torch.no_grad()
def sweep(weight: Tensor, factor: Tensor, rule: ColumnRule, *, block: int = 128) -> Tensor:
    """Return a weight matrix `(out, columns)`, float32, whose columns `rule` has changed one by one.

    `factor` is the `inverse_factor` of the second moments. A column's error corrects the columns of its own
    block of `block` columns at once, and all columns behind the block when the block is done. The result is
    the same, with less memory traffic.
    """
    weight = weight.float().clone()
    count = weight.shape[1]
    for start in range(0, count, block):
        end = min(start + block, count)
        # One column is one row of memory.
        part, upper = weight[:, start:end].T.contiguous(), factor[start:end, start:end]
        errors = torch.empty_like(part)
        diagonal = upper.diagonal()
        rule.begin(part.T, (part / diagonal[:, None]).square().T, start)
        for i in range(end - start):
            changed = rule.column(part[i], start + i)
            errors[i] = (part[i] - changed) / diagonal[i]
            part[i] = changed
            part[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        weight[:, start:end] = part.T
        weight[:, end:].addmm_(errors.T, factor[start:end, end:], alpha=-1)
    return weight


@torch.no_grad()
def descend(
    weight: Tensor,
    changed: Tensor,
    moments: Tensor,
    rule: ColumnRule,
    *,
    passes: int,
    damping: float = DAMPING,
    block: int = 128,
) -> Tensor:
    """Lower the error of a matrix that `sweep` made: choose each column anew, given all the others.

    `weight` and `changed`: `(out, columns)`; `moments`: H, `(columns, columns)`. With D = changed - weight,
    the error tr(D H D^T) is least where column j of D is -(sum over i != j of
    D_i H_ij) / H_jj; `rule.column` takes that value to an allowed one nearby. Never raises the error if the
    rule takes the nearest allowed value. `rule.begin` is not called. Returns a new matrix; stops early when a
    pass changes nothing.
    """
    weight, changed = weight.float(), changed.float().clone()
    diagonal = moments.diagonal() + damping * moments.diagonal().mean()
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    for _ in range(passes):
        moved = False
        for start in range(0, weight.shape[1], block):
            columns = slice(start, min(start + block, weight.shape[1]))
            # The gradient of the block's columns; one column is one row of memory.
            difference = changed - weight
            slope = (difference @ moments[:, columns]).T.contiguous()
            slope += damping * moments.diagonal().mean() * difference[:, columns].T
            part = changed[:, columns].T.contiguous()
            within = moments[columns, columns].clone()
            within.diagonal().copy_(diagonal[columns])
            for i in range(len(part)):
                new = rule.column(part[i] - slope[i] / within[i, i], start + i)
                step = new - part[i]
                if step.any():
                    moved = True
                    slope.addr_(within[i], step)
                    part[i] = new
            changed[:, columns] = part.T
        if not moved:
            break
    return changed
