"""Which variant to take: fronts of quality against cost, and the best within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan

import pandas as pd

from sdcomp.study.results import Row
from sdcomp.study.variants import FP32, Variant

GROUPS = {
    (False, False): "fp32",
    (True, False): "pruned",
    (False, True): "quantized",
    (True, True): "pruned and quantized",
}
"""The kind of a variant, by whether it is pruned and whether it is quantized."""


def group(variant: Variant) -> str:
    """The kind of a variant, one of `GROUPS`."""
    return GROUPS[variant.pruning != "", variant.recipe != ""]


def measured(rows: Iterable[Row], metric: str) -> pd.DataFrame:
    """One row for each variant with a `metric`. Where several studies have a variant, the first one counts.

    Columns: `study`; `variant`, its `label` and `group`; `quality`, the metric, from `low` to `high`;
    `worst`, the lower end of the variant's paired difference to fp32, NaN where that is not recorded.
    """
    rows = [row for row in rows if row["variant"] is not None and not row["about"]]
    worst = {
        (row["study"], row["variant"]): row["ci_low"]
        for row in rows
        if row["metric"] == f"{metric} difference" and row["baseline"] == FP32.label
    }
    found: dict[Variant, dict] = {}
    for row in rows:
        variant = row["variant"]
        if row["metric"] == metric and variant not in found:
            found[variant] = {
                "study": row["study"],
                "variant": variant,
                "label": variant.label,
                "group": group(variant),
                "quality": row["value"],
                "low": row["ci_low"],
                "high": row["ci_high"],
                "worst": 0.0 if variant == FP32 else worst.get((row["study"], variant), nan),
            }
    return pd.DataFrame(list(found.values()))


def pareto_front(cost: Sequence[float], quality: Sequence[float]) -> list[int]:
    """The indices of the points on the front, by rising cost.

    A point is on it where no other has at most its cost and at least its quality. Of equal points the first
    counts.
    """
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -quality[i])):
        if not front or quality[i] > quality[front[-1]]:
            front.append(i)
    return front


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
