"""Titles of figures, from made-up rows."""

import math

import pytest

from sdcomp.study import FP32, Variant, quantized, requested
from sdcomp.study.titles import (
    attributes_lost,
    bits_kept,
    late_errors,
    most_added,
    plain,
    rankings,
    saves_less,
    stays_below,
)


def row(label: str, value: float, width: float, n: int) -> dict:
    found = {"label": label, "value": value, "ci_low": value - width, "ci_high": value + width, "n": n}
    return {**found, "metric": "prompt accuracy difference", "unit": "%"}


def change(variant: Variant, value: float, low: float, n: int = 256) -> dict:
    ends = {"variant": variant, "label": variant.label, "value": value, "ci_low": low, "ci_high": -low}
    return {**ends, "metric": "prompt accuracy difference", "unit": "%", "n": n}


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("removed 0.25", "removed 25 %, int8", "removed, int8"),
        (
            "removed 0.6 global second_order",
            "removed 60 % by second order, int8",
            "removed by second order, int8",
        ),
        (
            "removed 0.6 second_order",
            "removed 60 % by second order in each layer, int8",
            "removed by second order in each layer, int8",
        ),
        ("unstructured 0.4 global", "unstructured 40 % global, int8", "unstructured global, int8"),
    ],
)
def test_names_in_figures_are_plain_and_differ_where_variants_do(text, name, line):
    variant = quantized("timestep_mse", 8, 8, 5, of=requested(text), execution="int8")
    assert plain(variant) == name.replace(" %", "\u00a0%") and plain(variant, amount=False) == line
    assert plain(variant.unquantized) == plain(variant).removesuffix(", int8")


def test_what_is_not_pruned_is_named_by_how_it_runs():
    simulated = quantized("timestep_mse", 8, 8, 5)
    assert [plain(v) for v in (FP32, simulated)] == ["fp32", "W8A8 simulated"]


def test_a_removal_saves_less_time_than_arithmetic_where_its_interval_is_above():
    removed = [requested(text) for text in ("removed 0.1", "removed 0.25")]
    int8 = quantized("timestep_mse", 8, 8, 5, execution="int8", of=removed[0])
    variants = [FP32, *removed, int8]
    rows = [
        {"variant": v, "value": low + 0.01, "ci_low": low, "n": 7}
        for v, low in zip(variants, (1, 0.95, 0.79, 0.7), strict=True)
    ]
    first, second = saves_less(rows, dict.fromkeys(removed, 0.8)).split("\n")
    assert first == "1 of 2 removals are shown to save less time than arithmetic (dashed)"
    few = [{**row, "n": 3} for row in rows]
    assert (
        second
        == saves_less(few, dict.fromkeys(removed, 0.8))
        == saves_less(rows, {})
        == "Calls take: removed\u00a025\u00a0%\u00a00.80"
    )


def test_bits_are_kept_where_all_higher_ones_are_too():
    lows = {(8, 32): -1, (4, 32): -2, (3, 32): -3, (8, 6): -2, (4, 6): -6, (3, 6): -1, (8, 4): -4}
    rows = [change(quantized("low_bits", w, a), -1, low) for (w, a), low in lows.items()]
    # W3A6 holds and W4A6 does not, so W3A6 is luck. 8 x 4 is the fewest of the others.
    assert bits_kept(rows) == "low_bits: prompt accuracy holds down to 8 bits of weights and 4 of activations"
    assert bits_kept(rows[:3]).endswith("holds down to 3 bits of weights and activations in full")
    assert bits_kept(rows, tolerance=1) == "low_bits: no bits are shown to keep prompt accuracy"
    few = [change(quantized("low_bits", 4, 4), 0, -20, n=16)]
    assert bits_kept(few) == "16 images do not tell which bits are enough: it takes 64."


def test_a_ranking_names_the_range_of_the_correlations():
    found = {"gain": 0.84, "final": 0.65, "layers": 0.88, "same": math.nan}
    assert rankings(found, 15) == "3 errors rank 15 variants; rank correlations with PSNR: 0.65 to 0.88"
    assert rankings({"gain": 0.5}, 10).endswith("PSNR: 0.50")
    assert rankings(found, 9) == "9 variants are too few to tell which error ranks them best"
    assert rankings({}, 0) == rankings({"same": math.nan}, 2) == "No error ranks the variants"


def test_a_step_adds_most_only_where_it_is_shown_to_add():
    small, large = (change(quantized(name, 4, 4), 3, 1) | {"ci_high": 6} for name in ("affine", "low_bits"))
    large |= {"value": 9, "ci_low": 5, "ci_high": 12}
    assert most_added([small, large], "W4A4") == "low_bits adds most at W4A4: 9.0 [5.0, 12.0] points"
    unclear = large | {"ci_low": -1}
    assert most_added([unclear], "W4A4") == "No step is shown to add anything at W4A4"
    assert (
        most_added([large | {"n": 16}], "W4A4")
        == "16 images do not tell which step adds anything: it takes 64."
    )


def test_errors_are_late_where_every_path_ends_with_its_largest():
    paths = {name: [{"value": v} for v in some] for name, some in {"a": [1, 2, 5], "b": [2, 1, 48]}.items()}
    assert late_errors(paths) == (
        "Every variant makes its largest error in the last step: 5 to 24 times that of the first"
    )
    early = {**paths, "c": [{"value": 3}, {"value": 1}]}
    assert late_errors(early) == "2 of 3 variants make their largest error in the last step"
    assert late_errors({}) == "0 of 0 variants make their largest error in the last step"


def test_attributes_are_lost_where_the_interval_of_the_difference_is_below_0():
    lost, kept = [row("a", -9, 3, 256), row("a", -3, 2, 256), row("a", -2, 3, 256)], [row("b", 3, 2, 256)]
    assert attributes_lost({"a": lost, "b": kept}) == (
        "Attributes that are shown to be lost: 2 of 3 by a, none by the others"
    )
    assert attributes_lost({"a": lost}).endswith("2 of 3 by a")
    assert attributes_lost({"b": kept}) == "No variant is shown to lose an attribute"


def test_from_where_on_a_curve_stays_below_a_limit():
    curve = [(60, 50), (0, 100), (30, 94), (50, 60), (40, 96)]
    assert stays_below(curve, 95) == "from 50 % on"
    assert stays_below(curve, 55) == "from 60 % on"
    assert stays_below(curve, 50) == "not up to 60 %"
    assert stays_below([], 95) == "not measured"
