"""Statistics over images with 95 % intervals, by bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdcomp.errors import NonFiniteError

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
    """The mean of `values` `(n,)`, after `transform` if given, with its percentile interval.

    Images are resampled with replacement (Efron 1979). `groups` names the scene of each image; then whole
    groups are resampled, since images of one scene are not independent. For a paired comparison, pass the
    differences. A single group has no interval (NaN). Raises ValueError for no values and for another number
    of groups, and NonFiniteError for values that are not finite: a variant with such values has failed, and
    its other values do not count (for values that do not apply, see `applicable`).
    """
    require_finite("scores", values)
    if groups and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: give one for each")
    data = values.double().cpu().numpy()
    labels = np.unique([repr(g) for g in groups], return_inverse=True)[1] if groups else np.arange(data.size)
    if data.size == 0:
        raise ValueError("an estimate needs at least one value")
    members = np.unique(labels, return_inverse=True)[1]
    sums, counts = np.bincount(members, data), np.bincount(members)
    rng = np.random.default_rng(seed)
    # A hundred resamples at a time, to save memory.
    draws = (rng.integers(0, counts.size, (100, counts.size)) for _ in range(RESAMPLES // 100))
    means = np.concatenate([sums[d].sum(1) / counts[d].sum(1) for d in draws])
    f = transform or (lambda x: x)
    low, high = np.sort(np.percentile(f(means), [2.5, 97.5])) if counts.size > 1 else (np.nan, np.nan)
    return Estimate(float(f(data.mean())), float(low), float(high), data.size)


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
    """The mean of a score `(n,)` with its interval; for a bool score the share of True, in percent.

    If all images (or groups) agree, a bootstrap has no spread; a share then gets Wilson's (1927) interval.
    Raises the errors of `bootstrap`.
    """
    if values.dtype != torch.bool:
        return bootstrap(values, groups=groups)
    share = bootstrap(100 * values.double(), groups=groups)
    if share.low != share.high:
        return share
    n, p, z2 = len(set(groups)) if groups else len(values), share.value / 100, 1.96**2
    center, half = p + z2 / 2 / n, np.sqrt(z2 * p * (1 - p) / n + (z2 / 2 / n) ** 2)
    center, half = center / (1 + z2 / n), half.item() / (1 + z2 / n)
    return Estimate(share.value, 100 * (center - half), 100 * (center + half), share.n)


def paired_difference(values: Tensor, baseline: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of `values - baseline`, image by image; for bool scores in percentage points.

    If no answer differs, a bootstrap has no spread. The interval then reaches as far on each side as the
    largest rate of an event that n groups all miss with a probability of 2.5 %. Raises ValueError unless both
    have the same shape, and the errors of `bootstrap`.
    """
    if values.shape != baseline.shape:
        raise ValueError(f"{tuple(values.shape)} values cannot be paired with {tuple(baseline.shape)}")
    if values.dtype != torch.bool:
        return bootstrap(values.double() - baseline.double(), groups=groups)
    change = bootstrap(100 * (values.double() - baseline.double()), groups=groups)
    if change.low != change.high:
        return change
    n = len(set(groups)) if groups else len(values)
    reach = 100 * (1 - 0.025 ** (1 / n))
    low, high = max(change.value - reach, -100.0), min(change.value + reach, 100.0)
    return Estimate(change.value, low, high, change.n)
