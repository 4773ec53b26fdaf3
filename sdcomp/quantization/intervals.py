"""Intervals of training timesteps: equal ones, and those that cost the least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from sdcomp.quantization.ranges import BINS, CANDIDATES, Histogram, error_table


def uniform_starts(k: int, train_timesteps: int) -> list[int]:
    """The first timesteps of `k` equal intervals over `train_timesteps`, ascending."""
    return [round(i * train_timesteps / k) for i in range(k)]


def optimal_groups(costs: np.ndarray, k: int) -> list[int]:
    """Where to cut a row of n items into `k` contiguous groups so that the sum of their costs is least.

    `costs[i, j]` is the cost of a group of items i to j, both included, `(n, n)`. Returns the first item
    of each group, ascending. Exact, by dynamic programming (Bellman 1961). Where sums are equal, the
    earliest cuts are taken. Raises ValueError for `k` out of 1 to n.
    """
    n = len(costs)
    if not 1 <= k <= n:
        raise ValueError(f"{n} items cannot be cut into {k} groups")
    least = costs[0].astype(np.float64)  # least[j]: items 0 to j in one group
    cuts = []
    for groups in range(1, k):
        # totals[i, j]: the least cost of items 0 to j if the last group has items i to j.
        totals = np.full((n, n), np.inf)
        for i in range(groups, n):
            totals[i, i:] = least[i - 1] + costs[i, i:]
        cuts.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    starts, end = [], n - 1
    for cut in reversed(cuts):
        starts.append(int(cut[end]))
        end = starts[-1] - 1
    return [0, *reversed(starts)]


def group_costs(steps: Sequence[Histogram], qmax: int, policy: str) -> np.ndarray:
    """The cost of quantizing an input with one range from step i to step j: `(n, n)`, infinite for i > j.

    `steps` are the histograms of the n calibration steps. Grids are symmetric, with the largest integer
    `qmax`. A group's range is the one that `policy`
    chooses for its merged histogram; its cost is the squared error relative to the power of the
    activations, at each step, summed over its steps. Errors are linear in the counts, so those of all
    groups are differences of cumulative sums.
    """
    n = len(steps)
    costs = np.full((n, n), np.inf)
    exponents = [step.exponent for step in steps if step.exponent is not None]
    if not exponents:
        return np.where(np.triu(np.ones((n, n))) > 0, 0.0, np.inf)
    top = max(exponents)
    counts = torch.stack([step.at(top).sum(dim=0) for step in steps]).double()
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    power = counts @ centres**2
    squared = counts @ error_table(qmax, 2.0).double().T / power.clamp(min=1e-30)[:, None]
    lp = counts @ error_table(qmax).double().T
    squared, lp = (
        torch.cat([torch.zeros(1, len(CANDIDATES), dtype=torch.float64), part.cumsum(0)])
        for part in (squared, lp)
    )
    shares = np.array([step.maximum for step in steps]) * 2.0**-top
    for i in range(n):
        if policy == "max":
            # The last candidate that still covers the largest magnitude.
            largest = torch.from_numpy(np.maximum.accumulate(shares[i:]))
            choice = (largest[:, None] <= CANDIDATES).sum(dim=1).clamp(min=1) - 1
        else:
            choice = (lp[i + 1 :] - lp[i]).argmin(dim=1)
        costs[i, i:] = (squared[i + 1 :] - squared[i]).gather(1, choice[:, None])[:, 0]
    return costs


def optimal_starts(
    inputs: Iterable[tuple[Sequence[Histogram], int]],
    timesteps: Sequence[float],
    k: int,
    policy: str,
) -> list[int]:
    """Return the first timesteps of the `k` intervals with the least cost summed over `inputs`, ascending.

    `timesteps` are the visited ones, ascending. Each input has one histogram for each of them, and the
    largest integer of a symmetric grid with its bits; the costs of affine grids are taken to be in
    proportion. A boundary lies midway between the timesteps it separates. Raises ValueError for more
    intervals than timesteps.
    """
    costs = sum(group_costs(steps, qmax, policy) for steps, qmax in inputs)
    groups = optimal_groups(costs, k)
    return [0] + [math.ceil((timesteps[i - 1] + timesteps[i]) / 2) for i in groups[1:]]
