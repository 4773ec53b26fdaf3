"""Statistics over images with 95 % intervals: scores by bootstrap, shares by score intervals.

`tests/benchmarks/coverage.py` measures how often these intervals contain the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from sdcomp.errors import NonFiniteError
from sdcomp.evaluation.shares import effective_number, student, tango, wilson

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic over `n` images with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


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
    members = _members(values, groups)
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


def _members(values: Tensor, groups: Sequence[Hashable] | None) -> np.ndarray:
    """The number of the group of each value, from 0 on; checks the values."""
    require_finite("scores", values)
    if groups and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: give one for each")
    if not len(values):
        raise ValueError("an estimate needs at least one value")
    numbers: dict[Hashable, int] = {}
    # By first appearance, so that the names of groups do not change what is drawn.
    return np.array([numbers.setdefault(g, len(numbers)) for g in groups or range(len(values))])


def require_finite(what: str, *values: Tensor) -> None:
    """Raise NonFiniteError if values are infinite or NaN; `what` names the values in the message."""
    for tensor in values:
        # `isfinite` makes a copy. Minimum and maximum need none, and they are NaN if any value is.
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(extreme.isfinite() for extreme in tensor.detach().aminmax()):
            bad = sum(int((~part.isfinite()).sum()) for part in tensor.reshape(-1).split(2**20))
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} {what} are not finite; record the variant as failed"
            )


def applicable(values: Tensor, groups: Sequence[Hashable]) -> tuple[Tensor, list[Hashable]]:
    """The values `(n,)` that apply, and their groups; NaN marks the others.

    For example, a scene with one object has no relation that could be right.
    """
    kept = ~values.isnan()
    return values[kept], [group for group, keep in zip(groups, kept.tolist(), strict=True) if keep]


def estimate(values: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of a score `(n,)` with its interval; for a bool score its `share_estimate`.

    Raises the errors of `bootstrap`.
    """
    return share_estimate(values, groups) if values.dtype == torch.bool else bootstrap(values, groups=groups)


def share_estimate(values: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values `(n,)` between 0 and 1, in percent, with Wilson's score interval.

    Clusters count as their `effective_number` of independent images. The interval is too wide for values
    that are not all 0 or 1. A single group has none. Raises the errors of `bootstrap`.
    """
    data, n = _shares(values, groups)
    low, high = wilson(data.mean(), n)
    return Estimate(*(100 * float(x) for x in (data.mean(), low, high)), data.size)


def paired_difference(values: Tensor, baseline: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of `values - baseline`, image by image; for bool scores in percentage points.

    Scores have an interval by bootstrap, bool scores Tango's score interval, where clusters count as their
    `effective_number` of independent pairs. Raises ValueError unless both have the same shape, and the errors
    of `bootstrap`.
    """
    if values.shape != baseline.shape:
        raise ValueError(f"{tuple(values.shape)} values cannot be paired with {tuple(baseline.shape)}")
    change = values.double() - baseline.double()
    if values.dtype != torch.bool:
        return bootstrap(change, groups=groups)
    data, n = _shares(change, groups)
    low, high = tango((data > 0).mean(), (data < 0).mean(), n)
    return Estimate(*(100 * float(x) for x in (data.mean(), low, high)), data.size)


def _shares(values: Tensor, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, float]:
    """The values, and their effective number; NaN for a single group."""
    members = _members(values, groups)
    data = values.double().cpu().numpy()
    return data, float(effective_number(data, members)) if members.any() else np.nan
