"""Statistics over images with 95 % intervals: scores by bootstrap, shares by score intervals.

`tests/benchmarks/coverage.py` measures how often these intervals contain the truth.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from sdcomp.evaluation.bootstrap import bootstrap, members_of
from sdcomp.evaluation.confidence_intervals import Estimate
from sdcomp.evaluation.share_intervals import difference_of_changes, effective_number, tango, wilson


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

    Scores have an interval by bootstrap, bool scores Tango's score interval. Differences of bool scores are
    int8, from -1 to 1; their own differences have the interval of `difference_of_changes`, in points too.
    Clusters count as their `effective_number` of independent pairs. Raises ValueError unless both have the
    same shape and are of one kind, and the errors of `bootstrap`.
    """
    if values.shape != baseline.shape:
        raise ValueError(f"{tuple(values.shape)} values cannot be paired with {tuple(baseline.shape)}")
    if any((values.dtype == kind) != (baseline.dtype == kind) for kind in (torch.bool, torch.int8)):
        raise ValueError(f"convert one side: {values.dtype} cannot be paired with {baseline.dtype}")
    change = values.double() - baseline.double()
    if values.dtype not in (torch.bool, torch.int8):
        return bootstrap(change, groups=groups)
    data, n = _shares(change, groups)
    if values.dtype == torch.bool:
        low, high = tango((data > 0).mean(), (data < 0).mean(), n)
    else:
        low, high = difference_of_changes(data.mean(), np.square(data).mean(), n)
    return Estimate(*(100 * float(x) for x in (data.mean(), low, high)), data.size)


def _shares(values: Tensor, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, float]:
    """The values, and their effective number; NaN for a single group."""
    members = members_of(values, groups)
    data = values.double().cpu().numpy()
    return data, float(effective_number(data, members)) if members.any() else np.nan
