"""Which variant to take: quality and loss of each, and the best within a budget."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from sdcomp.study.results import Row, select
from sdcomp.study.variants import FP32


def measured(rows: Iterable[Row], metric: str) -> pd.DataFrame:
    """One row for each variant with a `metric`, the first one fp32.

    Columns: `variant` and its `label`; `quality`, the metric; `change`, the paired difference to fp32, from
    `worst` to `best`.
    """
    rows = list(rows)
    changes = {
        row["variant"]: (row["value"], row["ci_low"], row["ci_high"])
        for row in select(rows, metric=f"{metric} difference", baseline=FP32.label)
        if not row["about"]
    }
    changes[FP32] = 0.0, 0.0, 0.0
    found = [
        (row["variant"], row["label"], row["value"], *changes[row["variant"]])
        for row in select(rows, metric=metric)
        if row["variant"] in changes and not row["about"]
    ]
    return pd.DataFrame(found, columns=["variant", "label", "quality", "change", "worst", "best"])


def recommend(points: pd.DataFrame, budget: float, tolerance: float) -> pd.Series | None:
    """The point to take where `MB` may be at most `budget`; None where nothing fits.

    A point is good enough where its paired difference is shown to be at least -`tolerance`: the lower end
    `worst` is (a test of non-inferiority). The fastest of these is taken, then the smallest. Where none is
    good enough, the point with the best `quality` is taken.
    """
    fits = points[points["MB"] <= budget]
    if fits.empty:
        return None
    good = fits[fits["worst"] >= -tolerance]
    if good.empty:
        return fits.sort_values(["quality", "MB"], ascending=[False, True], kind="stable").iloc[0]
    return good.sort_values(["time", "MB"], kind="stable").iloc[0]
