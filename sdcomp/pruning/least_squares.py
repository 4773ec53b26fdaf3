"""Elimination of inputs of a weight matrix: which unit costs least, and how the others make up for it.

A layer loses the inputs S, and its other weights and its bias are corrected by least squares. Then the error
of output i is w_S ((C^-1)_SS)^-1 w_S^T, for the row w of its weights and the covariance C of the inputs. This
is Optimal Brain Surgeon for groups of weights (ZipLM: Kurtic et al. 2023, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdcomp.column_sweep import DAMPING, inverse_factor
from sdcomp.moments import weight_matrix

STEPS = 64
"""The most steps in which `removal_levels` removes the units of a group."""

Levels = list[list[int]]
"""The units that stay at each level of removal: all at the first."""


@torch.no_grad()
def removal_levels(
    weight: Tensor,
    covariance: Tensor,
    gradients: Tensor,
    units: int,
    *,
    steps: int = STEPS,
    fewest: int = 0,
    damping: float = DAMPING,
) -> tuple[Levels, list[float]]:
    """Remove the input units of a weight matrix `(out, columns)` step by step, and measure the error.

    `units`: how many there are; each has the same number of consecutive columns. `covariance` is of the
    inputs, `(columns, columns)`; `gradients` `(out,)` weighs the outputs' squared errors. A step removes the
    unit that costs least at its turn, or several if there are more than `steps`; the last one leaves `fewest`
    units or fewer. Returns the units kept at each level, and the error there, with the other weights
    corrected.
    """
    factor = inverse_factor(covariance, damping)
    inverse, weight = factor.T @ factor, weight.float().clone()
    kept, width = list(range(units)), weight.shape[1] // units
    levels, errors = [kept], [0.0]
    while len(kept) > fewest:
        costs = _unit_costs(weight, inverse, gradients, width)
        chosen = costs.argsort(stable=True)[: math.ceil(units / steps)]
        gone = (chosen[:, None] * width + torch.arange(width, device=chosen.device)).flatten()
        stays = torch.ones(len(inverse), dtype=torch.bool, device=gone.device).index_fill_(0, gone, False)
        # (C^-1)_SS^-1 applied to the rows of C^-1 that go.
        lower = torch.linalg.cholesky(inverse[gone][:, gone])
        solved = torch.cholesky_solve(inverse[gone], lower)
        cost = (weight[:, gone] @ torch.cholesky_inverse(lower) * weight[:, gone]).sum(1)
        errors.append(errors[-1] + float(cost @ gradients))
        weight = (weight - weight[:, gone] @ solved)[:, stays]
        inverse = (inverse - inverse[:, gone] @ solved)[stays][:, stays]
        removed = set(chosen.tolist())
        kept = [unit for i, unit in enumerate(kept) if i not in removed]
        levels.append(kept)
    return levels, errors


def _unit_costs(weight: Tensor, inverse: Tensor, gradients: Tensor, width: int) -> Tensor:
    """The error of removing each unit by itself, `(units,)`."""
    units = weight.shape[1] // width
    if width == 1:
        return (weight.square() * gradients[:, None]).sum(0) / inverse.diagonal()
    blocks = torch.stack([inverse[i * width :][:width, i * width :][:, :width] for i in range(units)])
    slices = weight.unflatten(1, (units, width)).permute(1, 2, 0)  # (units, width, out)
    solved = torch.cholesky_solve(slices, torch.linalg.cholesky(blocks))
    return (slices * solved).sum(1) @ gradients


@torch.no_grad()
def correct_inputs(
    layer: nn.Conv2d | nn.Linear,
    units: int,
    kept: Sequence[int],
    covariance: Tensor,
    mean: Tensor,
    *,
    damping: float = DAMPING,
) -> None:
    """Set the inputs of all units but `kept` to zero, and correct the other weights and the bias, in place.

    Least squares with a ridge on the change: with K the columns that stay and S the others, W_K gets
    W_S C_SK C_KK^-1 added. The bias takes up the mean of the change, for the inputs' `mean` `(columns,)`.
    """
    weight = weight_matrix(layer).float()
    stays = torch.zeros(units, dtype=torch.bool)
    stays[list(kept)] = True
    stays = stays.repeat_interleave(weight.shape[1] // units).to(weight.device)
    new = torch.zeros_like(weight)
    if kept:
        factor = inverse_factor(covariance[stays][:, stays], damping)
        lost = weight[:, ~stays] @ covariance[~stays][:, stays]
        new[:, stays] = weight[:, stays] + lost @ factor.T @ factor
    if layer.bias is not None:
        layer.bias += ((weight - new) @ mean).to(layer.bias.dtype)
    layer.weight.copy_(new.view(layer.weight.shape))
