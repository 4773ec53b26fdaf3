"""Intervals of means by bootstrap: images, or whole scenes, are resampled."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist

import numpy as np
from torch import Tensor

from sdcomp.evaluation.confidence_intervals import Estimate, student
from sdcomp.evaluation.non_finite import require_finite

RESAMPLES = 2000


def bootstrap(
    values: Tensor,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Estimate:
    """The mean of `values` `(n,)`, after `transform` if given, with its interval by bootstrap.

    Images are resampled with replacement (Efron 1979). `groups` names the scene of each image; then whole
    groups are resampled, since images of one scene are not independent. The percentiles are those that make
    the interval of a normal mean as wide as Student's (the expanded percentiles of Hesterberg 2015). For a
    paired comparison, pass the differences. A single group has no interval (NaN). Raises ValueError for no
    values and for another number of groups, and NonFiniteError for values that are not finite: a variant
    with such values has failed, and its other values do not count (for values that do not apply, see
    `applicable`).
    """
    members = members_of(values, groups)
    data = values.double().cpu().numpy()
    f = transform or (lambda x: x)
    sums, counts = np.bincount(members, data), np.bincount(members)
    low = high = np.nan
    if counts.size > 1:
        rng = np.random.default_rng(seed)
        # A hundred resamples at a time, to save memory.
        draws = (rng.integers(0, counts.size, (100, counts.size)) for _ in range(RESAMPLES // 100))
        means = np.concatenate([sums[d].sum(1) / counts[d].sum(1) for d in draws])
        tail = 100 * NormalDist().cdf(-np.sqrt(counts.size / (counts.size - 1)) * student(counts.size - 1))
        low, high = np.sort(np.percentile(f(means), [tail, 100 - tail]))
    return Estimate(float(f(data.mean())), float(low), float(high), data.size)


def members_of(values: Tensor, groups: Sequence[Hashable] | None) -> np.ndarray:
    """The number of the group of each value, from 0 on; checks the values."""
    require_finite("scores", values)
    if groups and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: give one for each")
    if not len(values):
        raise ValueError("an estimate needs at least one value")
    numbers: dict[Hashable, int] = {}
    # By first appearance, so that the names of groups do not change what is drawn.
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups or range(len(values))])
