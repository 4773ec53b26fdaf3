"""What a run says in words, from made-up rows."""

import pytest
import torch

from sdcomp.evaluation import paired_difference
from sdcomp.study import FP32, Variant, pruned, quantized
from sdcomp.study.answers import (
    added_losses,
    answer,
    fastest,
    fewest_bits,
    repeated,
    smallest_file,
    tolerance_of,
)
from sdcomp.study.variants import patterned


def row(label: str, value: float, width: float, n: int) -> dict:
    found = {"label": label, "value": value, "ci_low": value - width, "ci_high": value + width, "n": n}
    return {**found, "metric": "prompt accuracy difference", "unit": "%"}


def paired(values: list[bool], baseline: list[bool], groups: list[str] | None = None) -> dict:
    found = paired_difference(torch.tensor(values), torch.tensor(baseline), groups)
    ends = {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n}
    variant = patterned("2:4")
    about = {"metric": "prompt accuracy difference", "unit": "%", "variant": variant, "label": variant.label}
    return ends | about


def test_few_images_give_no_verdict():
    lines = answer([row("2:4", -3, 9, 32), row("removed 25 %", -8, 11, 32)]).splitlines()
    assert lines[0].startswith("32 images a variant.") and "reach 10.0 (%)" in lines[0]
    assert lines[1] == "Fewer than 64 images give no verdict. Differences to fp32:"
    assert lines[2:] == ["- 2:4: -3.0 [-12.0, 6.0]", "- removed 25 %: -8.0 [-19.0, 3.0]"]


def test_one_image_has_no_interval():
    lines = answer([paired([False], [True])]).splitlines()
    assert lines[0] == "1 images a variant are too few for intervals of the prompt accuracy difference."
    assert lines[2:] == ["- 2:4: -100.0"]


def test_many_images_of_one_scene_give_no_verdict():
    found = paired([True] * 64, [True] * 64, ["a red star"] * 64)
    assert "'Loses at most 5' cannot be told at this n:\n- 2:4: 0.0" in answer([found])
    assert smallest_file([found], {found["variant"]: 1.0}, 18.7).startswith("Of 1 file, none below")


def test_each_score_has_its_own_tolerance():
    accuracy = row("2:4", -2.3, 0.6, 256)
    clip = {**accuracy, "metric": "CLIP score difference", "unit": "100 x cosine"}
    assert "'Loses at most 5' holds" in answer([accuracy])
    assert "'Loses at most 1' does not hold" in answer([clip])
    little = [{**change(W4, loss, -0.9), "metric": "CLIP score difference"} for loss in (-0.4, -0.5)]
    limits = "at most 0.4 points of CLIP score (interval not below -1)"
    assert f"Of 3 files, the smallest that loses {limits} has 4.90 MB" in smallest_file(
        little[:1], FILES, 18.7
    )
    assert f"none below the 18.7 MB of fp16 is within the limits: {limits}." in smallest_file(
        little[1:], FILES, 18.7
    )


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
        ((-2.0, -5.0), (-2.1, -4.0), "3.90 MB, 21 % of fp16 (weights_gptq W3 packed: -2.0 [-5.0, 5.0]"),
        ((-2.0, -5.1), (-3.0, -4.0), "4.90 MB, 26 % of fp16 (weights_gptq W4 packed: -0.4 [-2.0, 2.0]"),
        ((-9.0, -9.9), (1.0, -4.9), "3.00 MB, 16 % of fp16 (unstructured 50 %, weights_gptq W3 packed: 1.0"),
    ],
)
def test_the_smallest_file_has_a_small_loss_by_its_mean_and_by_its_interval(w3, sparse, said):
    rows = [change(W4, -0.4, -2.0), change(W3, *w3), change(SPARSE, *sparse)]
    found = smallest_file(rows, FILES, 18.7)
    limits = "at most 2 points of prompt accuracy (interval not below -5)"
    assert found.startswith(f"Of 3 files, the smallest that loses {limits} has {said}")


def test_no_file_is_called_the_smallest_without_the_images_to_tell():
    found = smallest_file([change(W4, 0.0, -1.0, n=63)], FILES, 18.7)
    assert found == "63 images do not tell which file is the smallest: it takes 64."
    assert "Of 3 files, the smallest" in smallest_file([change(W4, 0.0, -1.0, n=64)], FILES, 18.7)
    assert smallest_file([], FILES, 18.7) == "No variant gave images, so this run has no answer."


def test_a_file_that_is_no_smaller_than_fp16_or_loses_much_is_not_named():
    none = "none below the 18.7 MB of fp16 is within the limits: at most 2 points of prompt accuracy"
    assert none in smallest_file([change(W4, -3.0, -4.0)], FILES, 18.7)
    assert none in smallest_file([change(W4, 0.0, -1.0)], {W4: 18.7}, 18.7)
    # A simulation has no file that runs.
    assert none in smallest_file([change(W4.simulation, 0.0, -1.0)], FILES, 18.7)


def test_the_fewest_bits_of_a_method_are_those_that_lose_little():
    methods = {
        "good": [change(W4, 0.0, -1.0), change(W3, -1.9, -4.9)],
        "wide": [change(W4, 0.0, -1.0), change(W3, 0.0, -5.1)],
        "bad": [change(W4, -2.1, -3.0)],
        "lucky": [change(W4, -6.0, -9.0), change(W3, 0.0, -3.0)],  # fewer bits than ones that lose
    }
    limits = "at most 2 points of prompt accuracy (interval not below -5)"
    said = f"The fewest bits that lose {limits}, 256 images: good 3, wide 4, bad none, lucky none."
    assert fewest_bits(methods).replace("\N{NO-BREAK SPACE}", " ") == said
    few = {"good": [change(W4, 0.0, -1.0, n=63)]}
    assert fewest_bits(few) == "63 images do not tell which bits are enough: it takes 64."


INT8 = quantized("timestep_mse", 8, 8, 10, execution="int8")
FEW, INT8_FEW = Variant(steps=6), quantized("timestep_mse", 8, 8, 10, of=Variant(steps=6), execution="int8")
TIMES = {FP32: 0.4, FEW: 0.12, INT8: 0.3, INT8_FEW: 0.1}


def test_the_fastest_stands_beside_fewer_steps_alone():
    rows = [change(FEW, -0.5, -2.0), change(INT8, 0.0, -1.0), change(INT8_FEW, -1.0, -3.0)]
    first, second = fastest(rows, TIMES).splitlines()
    assert first.startswith("Of all executions, the fastest that loses at most 2 points of prompt accuracy")
    assert first.endswith(
        "0.100 s of UNet time an image: 4.0 times as fast as the UNet in fp32"
        f" ({INT8_FEW.label}: -1.0 [-3.0, 3.0])."
    )
    assert second.startswith("Of fewer steps of fp32 alone, the fastest that loses at most 2 points")
    assert second.endswith(
        "0.120 s of UNet time an image: 3.3 times as fast as the UNet in fp32"
        " (fp32, 6 steps: -0.5 [-2.0, 2.0])."
    )


def test_an_execution_that_loses_much_or_saves_nothing_is_not_the_fastest():
    rows = [change(FEW, -0.5, -5.5), change(INT8, 0.0, -1.0), change(INT8_FEW, -2.5, -3.0)]
    first, second = fastest(rows, TIMES).splitlines()
    assert "0.300 s of UNet time an image: 1.3 times" in first
    assert second.startswith("Of fewer steps of fp32 alone, none that is faster than fp32 is within")
    assert "none that is faster" in fastest([change(INT8, 0.0, -1.0)], {FP32: 0.4, INT8: 0.5})
    assert fastest([change(INT8, 0.0, -1.0, n=32)], TIMES).startswith("32 images do not tell which execution")


def test_added_losses_counts_what_is_worse_for_certain():
    rows = [change(W4, -3.0, -5.0) | {"ci_high": high} for high in (-0.1, 0.0, 1.0)]
    said = "Quantizing a pruned UNet is shown to cost prompt accuracy in 1 of 3 cases"
    assert added_losses(rows) == said
    ends = [(-2.0, -0.1), (-1.0, 0.0), (-1.0, 1.0), (0.1, 2.0), (0.2, 1.0)]
    more = [change(W4, 0.0, low) | {"ci_high": high} for low, high in ends]
    assert added_losses(rows, more) == f"{said}; more than it costs the whole UNet in 1, less in 2"
    few = added_losses([change(W4, 0.0, -1.0, n=63)])
    assert few == "63 images do not tell which quantization costs a pruned UNet anything: it takes 64."
    assert added_losses([]) == "No variant gave images, so this run has no answer."


def test_what_was_chosen_is_judged_again():
    lows = {W4: -3.0, W3: -5.1}
    rows = [change(v, -1.0, low) | {"about": {"prompts": "final"}} for v, low in lows.items()]
    assert repeated(rows) == (
        "On 256 other prompts ('final'), on which nothing was chosen:"
        " weights_gptq W4 packed: -1.0 [-3.0, 3.0], within these limits;"
        " weights_gptq W3 packed: -1.0 [-5.1, 5.1], outside these limits."
    )
    assert repeated(rows, tolerance=6).count("within these limits") == 2
    assert repeated([change(W4, -2.1, -3.0) | {"about": {"prompts": "final"}}]).endswith(
        "outside these limits."
    )


def test_few_images_of_other_prompts_tell_nothing():
    few = [change(W4, 0.0, -1.0, n=2) | {"about": {"prompts": "final"}}]
    assert repeated(few) == "2 images do not tell which losses are the same on other prompts: it takes 64."


def test_each_score_has_its_own_tolerance_unless_one_is_given():
    assert tolerance_of("prompt accuracy", "") == 5 and tolerance_of("CLIP score") == 1
    assert tolerance_of("CLIP score", 2.5) == 2.5
