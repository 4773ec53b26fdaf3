"""Fronts and budgets, against brute force and by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcomp.study import FP32, pruned, quantized
from sdcomp.study.pareto import measured, pareto_front, recommend
from sdcomp.study.results import typed

numbers = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    front = pareto_front([c for c, _ in points], [q for _, q in points])

    def dominated(c, q):
        return any((c2 <= c and q2 >= q) and (c2, q2) != (c, q) for c2, q2 in points)

    assert {points[i] for i in front} == {p for p in points if not dominated(*p)}
    assert len({points[i] for i in front}) == len(front)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def table(*rows):
    return pd.DataFrame(rows, columns=["label", "MB", "time", "quality", "worst"])


POINTS = table(
    ("best", 9, 0.9, 91.0, -2.0),
    ("fast", 8, 0.6, 89.0, -4.5),
    ("faster", 7, 0.5, 84.0, -9.0),
    ("small", 2, 0.7, 40.0, -60.0),
    ("worse", 2, 0.4, 30.0, -70.0),
)


@pytest.mark.parametrize(
    ("budget", "tolerance", "label"),
    [
        (10, 5, "fast"),  # the fastest within tolerance
        (10, 3, "best"),
        (7.5, 5, "faster"),  # none within tolerance: the best
        (2, 5, "small"),
        (2, 65, "small"),
        (2, 75, "worse"),
    ],
)
def test_the_fastest_that_is_shown_not_to_be_much_worse_is_recommended(budget, tolerance, label):
    assert recommend(POINTS, budget, tolerance)["label"] == label


def test_nothing_is_recommended_where_nothing_fits():
    assert recommend(POINTS, 1.9, 5) is None


REMOVED = quantized("timestep_mse", 8, 8, 10, of=pruned("removed", 0.25, recover_steps=400), execution="int8")
SPARSE = pruned("unstructured", 0.3)
MSE = quantized("mse", 6, 6)


def row(study, variant, metric, value, low=np.nan, baseline="", **about):
    return typed(
        {
            "study": study, "method": variant.method, "parameters": variant.parameters | about,
            "metric": metric, "value": value, "ci_low": low, "ci_high": 99.0, "baseline": baseline,
        }
    )  # fmt: skip


def test_each_variant_is_measured_once_with_its_difference_to_the_baseline():
    points = measured(
        [
            row("04", FP32, "accuracy", 90.0),
            row("04", REMOVED, "accuracy", 88.0),
            row("04", REMOVED, "accuracy difference", -2.0, -4.0, "fp32"),
            row("04", REMOVED, "accuracy difference", 1.0, 0.5, SPARSE.label),
            row("04", REMOVED, "accuracy", 10.0, split="unseen"),
            row("04", REMOVED, "PSNR", 20.0),
            row("02", FP32, "accuracy", 91.0),
            row("02", SPARSE, "accuracy", 91.0),
            row("02", SPARSE, "accuracy difference", 1.0, -1.5, "fp32"),
            row("02", REMOVED, "accuracy", 70.0),
            row("01", MSE, "accuracy", 89.0),
            {**row("03", FP32, "accuracy", 1.0), "variant": None},
        ],
        "accuracy",
    )
    assert points[["study", "group", "quality"]].to_numpy().tolist() == [
        ["04", "fp32", 90.0],
        ["04", "pruned and quantized", 88.0],
        ["02", "pruned", 91.0],
        ["01", "quantized", 89.0],
    ]
    # The last difference was not recorded.
    assert points["worst"].tolist() == pytest.approx([0.0, -4.0, -1.5, float("nan")], nan_ok=True)
    assert points["variant"].tolist() == [FP32, REMOVED, SPARSE, MSE]
