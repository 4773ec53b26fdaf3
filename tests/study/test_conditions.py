"""The calibrations and conditions of 07_conditions, and what it records of attributes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_low_bits import Rows

import sdcomp
from sdcomp import scenes
from sdcomp.evaluation import load_prompts
from sdcomp.quantization import PRESETS
from sdcomp.quantization.attention import QuantAttentionProduct
from sdcomp.study import FP32, quantized
from sdcomp.study.conditions import (
    Calibrated,
    Condition,
    calibrations,
    condition,
    with_products,
)
from sdcomp.study.records import record_attribute_accuracy

OWN = Condition("ddim", 20, 4.0)


def test_a_plan_has_every_draw_and_one_change_at_a_time():
    found = calibrations("mse", [16, 4], 2, ["ddpm", "ddim"], ["merged", "max", "mse", "maximum"])
    assert [way.label for way in found] == [
        "4 prompts, draw 1", "4 prompts, draw 2", "16 prompts, draw 1", "16 prompts, draw 2",
        "16 prompts, draw 1, ddim", "16 prompts, draw 1, merged", "16 prompts, draw 1, max",
    ]  # fmt: skip
    # The preset goes by mse and maximum, and is calibrated with ddpm: these change nothing.
    assert Calibrated(16) in found and Calibrated(1).label == "1 prompt, draw 1"


def test_a_policy_changes_one_argument_of_the_preset():
    assert Calibrated(4).recipe("mse") == PRESETS["mse"]
    merged = Calibrated(4, policy="merged").recipe("mse")
    assert merged.calibrator == {"act_scale_policy": "mse", "act_update_policy": "merged"}
    assert replace(merged, calibrator=PRESETS["mse"].calibrator) == PRESETS["mse"]
    assert Calibrated(4, policy="max").recipe("mse").calibrator == PRESETS["max"].calibrator


def test_draws_share_neither_prompts_nor_noise():
    own = {"prompts": list("abcdef"), "sampler": "ddpm", "seed": 1, "batch_size": 6, "steps": 5}
    first, second = (Calibrated(3, draw, "ddim").settings(own) for draw in (0, 1))
    assert first == {"prompts": list("abc"), "sampler": "ddim", "seed": 1, "batch_size": 3, "steps": 5}
    assert second == {**first, "prompts": list("def"), "seed": 2}
    assert own["prompts"] == list("abcdef")


def test_with_products_quantizes_attention_and_nothing_else(small):
    recipe = with_products("low_bits")
    assert replace(recipe, model=PRESETS["low_bits"].model) == PRESETS["low_bits"]
    assert PRESETS["low_bits"].model.items() < recipe.model.items()
    model = sdcomp.quantization.build(recipe, small.unet, 8, 8)
    assert any(isinstance(part, QuantAttentionProduct) for part in model.modules())


CONDITIONS = [
    ("ddpm", replace(OWN, sampler="ddpm")),
    ("10 steps", replace(OWN, steps=10)),
    ("guidance 7.5", replace(OWN, guidance_scale=7.5)),
    ("guidance 2 dpmpp_2m 10 steps", Condition("dpmpp_2m", 10, 2.0)),
]


@pytest.mark.parametrize(("text", "wanted"), CONDITIONS)
def test_a_condition_is_the_studys_own_in_all_that_it_does_not_name(text, wanted):
    assert condition(text, OWN) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "10", "steps", "guidance", "euler", "ddpm ddim", "5 steps 6 steps", "guidance x", "1.5 steps"],
)
def test_other_words_are_no_condition(text):
    with pytest.raises(ValueError):
        condition(text, OWN)


def test_attributes_are_compared_image_by_image():
    sd = sdcomp.load("data/tiny")
    prompts = load_prompts(sd, "test", 12)
    drawn = scenes.render(prompts.scenes, 0)
    # The last image shows another scene in another colour.
    worse = torch.cat([drawn[:-1], drawn[:1]])
    variant, run, kept = quantized("mse", 5, 5), Rows(), {}
    run.images.keep = lambda subject, metric, values, groups, *, places, attribute: kept.update(
        {attribute: (values, places)}
    )
    record_attribute_accuracy(run, variant, sd, worse, drawn, prompts)
    values, places = kept["color"]
    assert places == list(range(12)) and values.dtype == torch.bool and not values[-1]
    change = run.rows["attribute accuracy difference", "color"]
    assert change.value == pytest.approx(-100 / 12) and change.low < change.value < change.high
    pairs = [i for i, scene in enumerate(prompts.scenes) if len(scene.things) == 2]
    assert kept["relation"][1] == pairs and run.rows["attribute accuracy", "relation"].n == len(pairs)


def test_the_baseline_has_no_difference_and_no_reader_records_nothing():
    sd = sdcomp.load("data/tiny")
    prompts = load_prompts(sd, "test", 4)
    run, images = Rows(), scenes.render(prompts.scenes, 0)
    record_attribute_accuracy(run, FP32, sd, images, images, prompts)
    assert {metric for metric, _ in run.rows} == {"attribute accuracy"}
    without = Rows()
    record_attribute_accuracy(without, FP32, sd.replace(reader=None), images, images, prompts)
    assert without.rows == {}
