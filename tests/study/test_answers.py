"""What a run says in words, from made-up rows."""

import pytest

from sdcomp.study import FP32, Variant, pruned, quantized
from sdcomp.study.answers import (
    about_equal,
    answer,
    bits_kept,
    fastest,
    fewest_bits,
    late_errors,
    missed_more,
    smallest_file,
)


def row(label: str, value: float, width: float, n: int) -> dict:
    found = {"label": label, "value": value, "ci_low": value - width, "ci_high": value + width, "n": n}
    return {**found, "metric": "prompt accuracy difference", "unit": "%"}


def test_few_images_give_no_verdict():
    lines = answer([row("2:4", -3, 9, 32), row("removed 25 %", -8, 11, 32)]).splitlines()
    assert lines[0].startswith("32 images a variant.") and "reach 10.0 (%)" in lines[0]
    assert lines[1] == "Fewer than 64 images give no verdict. Differences to fp32:"
    assert lines[2:] == ["- 2:4: -3.0 [-12.0, 6.0]", "- removed 25 %: -8.0 [-19.0, 3.0]"]


def test_one_image_has_no_interval():
    lines = answer([row("2:4", -3, float("nan"), 1)]).splitlines()
    assert lines[0] == "1 images a variant are too few for intervals of the prompt accuracy difference."
    assert lines[2:] == ["- 2:4: -3.0"]


def test_enough_images_give_verdicts_by_their_intervals():
    rows = [row("good", -1, 2, 256), row("bad", -20, 2, 256), row("open", -4, 3, 256)]
    lines = answer(rows, tolerance=5).splitlines()
    assert lines[1:] == [
        "'Loses at most 5' holds:",
        "- good: -1.0 [-3.0, 1.0]",
        "'Loses at most 5' does not hold:",
        "- bad: -20.0 [-22.0, -18.0]",
        "'Loses at most 5' cannot be told at this n:",
        "- open: -4.0 [-7.0, -1.0]",
    ]


def test_a_run_without_images_says_so():
    assert answer([]) == "No variant gave images, so this run has no answer."


W4, W3 = (quantized("weights_gptq", bits, execution="packed") for bits in (4, 3))
SPARSE = quantized("weights_gptq", 3, of=pruned("unstructured", 0.5), execution="packed")
FILES = {W4: 4.9, W3: 3.9, SPARSE: 3.0}


def change(variant: Variant, value: float, low: float, n: int = 256) -> dict:
    found = {
        "variant": variant,
        "label": variant.label,
        "value": value,
        "ci_low": low,
        "ci_high": -low,
        "n": n,
    }
    return {**found, "metric": "prompt accuracy difference", "unit": "%"}


@pytest.mark.parametrize(
    ("w3", "sparse", "said"),
    [
        ((-2.0, -5.0), (-2.1, -4.0), "3.90 MB, 21% of fp16 (weights_gptq W3 packed: -2.0 [-5.0, 5.0]"),
        ((-2.0, -5.1), (-3.0, -4.0), "4.90 MB, 26% of fp16 (weights_gptq W4 packed: -0.4 [-2.0, 2.0]"),
        ((-9.0, -9.9), (1.0, -4.9), "3.00 MB, 16% of fp16 (unstructured 50 %, weights_gptq W3 packed: 1.0"),
    ],
)
def test_the_smallest_file_has_a_small_loss_by_its_mean_and_by_its_interval(w3, sparse, said):
    rows = [change(W4, -0.4, -2.0), change(W3, *w3), change(SPARSE, *sparse)]
    found = smallest_file(rows, FILES, 18.7)
    limits = "at most 2 points lost (5 at the worse end of its interval)"
    assert found.startswith(f"The smallest of 3 files with {limits}: {said}")


def test_no_file_is_called_the_smallest_without_the_images_to_tell():
    found = smallest_file([change(W4, 0.0, -1.0, n=63)], FILES, 18.7)
    assert found == "63 images do not tell which file is the smallest: it takes 64."
    assert "smallest of 3 files" in smallest_file([change(W4, 0.0, -1.0, n=64)], FILES, 18.7)
    assert smallest_file([], FILES, 18.7) == "No variant gave images, so this run has no answer."


def test_a_file_that_is_no_smaller_than_fp16_or_loses_much_is_not_named():
    none = "No file below the 18.7 MB of fp16 is shown to have at most 2 points lost"
    assert smallest_file([change(W4, -3.0, -4.0)], FILES, 18.7).startswith(none)
    assert smallest_file([change(W4, 0.0, -1.0)], {W4: 18.7}, 18.7).startswith(none)
    # A simulation has no file that runs.
    assert smallest_file([change(W4.simulation, 0.0, -1.0)], FILES, 18.7).startswith(none)


def test_the_fewest_bits_of_a_method_are_those_that_lose_little():
    methods = {
        "good": [change(W4, 0.0, -1.0), change(W3, -1.9, -4.9)],
        "wide": [change(W4, 0.0, -1.0), change(W3, 0.0, -5.1)],
        "bad": [change(W4, -2.1, -3.0)],
    }
    said = "at most 2 points lost (5 at the worse end of its interval), 256 images: good 3, wide 4, bad none."
    assert fewest_bits(methods).replace("\N{NO-BREAK SPACE}", " ") == f"The fewest bits with {said}"
    few = {"good": [change(W4, 0.0, -1.0, n=63)]}
    assert fewest_bits(few) == "63 images do not tell which bits are enough: it takes 64."


INT8 = quantized("timestep_mse", 8, 8, 10, execution="int8")
FEW, INT8_FEW = Variant(steps=6), quantized("timestep_mse", 8, 8, 10, of=Variant(steps=6), execution="int8")
TIMES = {FP32: 0.4, FEW: 0.12, INT8: 0.3, INT8_FEW: 0.1}


def test_the_fastest_stands_beside_fewer_steps_alone():
    rows = [change(FEW, -0.5, -2.0), change(INT8, 0.0, -1.0), change(INT8_FEW, -1.0, -3.0)]
    first, second = fastest(rows, TIMES).splitlines()
    assert first.startswith("The fastest execution, with at most 2 points lost")
    assert first.endswith(
        "0.100 s of UNet time an image, 4.0 times as fast as the UNet in fp32"
        f" ({INT8_FEW.label}: -1.0 [-3.0, 3.0])."
    )
    assert second.startswith("Fewer steps of fp32 alone, with at most 2 points lost")
    assert second.endswith(
        "0.120 s of UNet time an image, 3.3 times as fast as the UNet in fp32"
        " (fp32, 6 steps: -0.5 [-2.0, 2.0])."
    )


def test_an_execution_that_loses_much_or_saves_nothing_is_not_the_fastest():
    rows = [change(FEW, -0.5, -5.5), change(INT8, 0.0, -1.0), change(INT8_FEW, -2.5, -3.0)]
    first, second = fastest(rows, TIMES).splitlines()
    assert "0.300 s of UNet time an image, 1.3 times" in first
    assert second.startswith("Fewer steps of fp32 alone: none that is faster than fp32 is shown to have")
    assert "none that is faster" in fastest([change(INT8, 0.0, -1.0)], {FP32: 0.4, INT8: 0.5})
    assert fastest([change(INT8, 0.0, -1.0, n=32)], TIMES).startswith("32 images do not tell which execution")


def test_bits_are_kept_where_all_higher_ones_are_too():
    lows = {(8, 32): -1, (4, 32): -2, (3, 32): -3, (8, 6): -2, (4, 6): -6, (3, 6): -1, (8, 4): -4}
    rows = [change(quantized("low_bits", w, a), -1, low) for (w, a), low in lows.items()]
    # W3A6 holds and W4A6 does not, so W3A6 is luck. 8 x 4 is the fewest of the others.
    assert bits_kept(rows) == "low_bits: prompt accuracy holds down to 8 bits of weights and 4 of activations"
    assert bits_kept(rows[:3]).endswith("holds down to 3 bits of weights and activations in full")
    assert bits_kept(rows, tolerance=1) == "low_bits: no bits are shown to keep prompt accuracy"
    few = [change(quantized("low_bits", 4, 4), 0, -20, n=16)]
    assert bits_kept(few) == "16 images do not tell which bits are enough: it takes 64."


def test_measures_near_the_best_are_about_equal():
    found = {"gain": 0.84, "final": 0.65, "layers": 0.88, "step": 0.86}
    assert about_equal(found) == "3 of 4 errors rank the variants about equally (0.84 to 0.88); final 0.65"
    assert (
        about_equal(found, 0.01) == "layers ranks the variants best (0.88); step 0.86, gain 0.84, final 0.65"
    )
    assert about_equal(found, 1.0) == "4 of 4 errors rank the variants about equally (0.65 to 0.88)"


def test_errors_are_late_where_every_path_ends_with_its_largest():
    paths = {name: [{"value": v} for v in some] for name, some in {"a": [1, 2, 5], "b": [2, 1, 48]}.items()}
    assert late_errors(paths) == (
        "Every variant makes its largest error in the last step: 5 to 24 times that of the first"
    )
    early = {**paths, "c": [{"value": 3}, {"value": 1}]}
    assert late_errors(early) == "2 of 3 variants make their largest error in the last step"
    assert late_errors({}) == "0 of 0 variants make their largest error in the last step"


def test_attributes_are_missed_more_often_where_intervals_do_not_overlap():
    own = [row("fp32", 0, 2, 256), row("fp32", 8, 4, 256)]
    worse, same = [row("a", 9, 3, 256), row("a", 14, 3, 256)], [row("b", 3, 2, 256), row("b", 1, 1, 256)]
    assert missed_more({"a": worse, "b": same}, own) == (
        "Shown to be missed more often than by fp32: 1 of 2 attributes by a, none by the others"
    )
    assert missed_more({"a": worse}, own).endswith("1 of 2 attributes by a")
    assert missed_more({"b": same}, own) == "No variant is shown to miss an attribute more often than fp32"
