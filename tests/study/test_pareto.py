"""What was measured of each variant, and which one to take, by hand."""

import numpy as np
import pandas as pd
import pytest

from sdcomp.study import FP32, pruned, quantized
from sdcomp.study.pareto import measured, recommend
from sdcomp.study.results import typed


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


def row(variant, metric, value, low=np.nan, high=np.nan, baseline="", **about):
    return typed(
        {
            "method": variant.method, "parameters": variant.parameters | about, "metric": metric,
            "value": value, "ci_low": low, "ci_high": high, "baseline": baseline,
        }
    )  # fmt: skip


def test_each_variant_has_its_quality_and_its_difference_to_fp32():
    points = measured(
        [
            row(FP32, "accuracy", 90.0),
            row(REMOVED, "accuracy", 88.0),
            row(REMOVED, "accuracy difference", -2.0, -4.0, 1.0, "fp32"),
            row(REMOVED, "accuracy difference", 1.0, 0.5, 1.5, SPARSE.label),
            row(REMOVED, "accuracy", 10.0, split="unseen"),
            row(REMOVED, "PSNR", 20.0),
            row(SPARSE, "accuracy", 91.0),
            row(SPARSE, "accuracy difference", 1.0, -1.5, 3.0, "fp32"),
            {**row(FP32, "accuracy", 1.0), "variant": None},
        ],
        "accuracy",
    )
    found = points.drop(columns="label").to_numpy().tolist()
    assert found == [
        [FP32, 90.0, 0.0, 0.0, 0.0],
        [REMOVED, 88.0, -2.0, -4.0, 1.0],
        [SPARSE, 91.0, 1.0, -1.5, 3.0],
    ]
    assert points["label"].tolist() == ["fp32", REMOVED.label, SPARSE.label]
