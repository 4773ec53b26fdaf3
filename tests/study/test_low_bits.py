"""The recipes of 06_low_bits, and what it records of images and of paths."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sdcomp.evaluation import PathErrors
from sdcomp.quantization import PRESETS
from sdcomp.quantization.methods import LowRankBranch, SecondOrderRounding
from sdcomp.study import quantized
from sdcomp.study.low_bits import LADDER, range_recipe, range_variants
from sdcomp.study.records import record_path


class Rows:
    """Takes the place of a `Run`."""

    def __init__(self):
        self.rows = {}
        self.images = SimpleNamespace(keep=lambda *_, **__: None)

    def record(self, variant, metric, estimate, *, unit="", baseline="", **about):
        self.rows[metric, *about.values()] = estimate


def test_each_rung_of_the_ladder_adds_one_thing():
    symmetric, affine, gptq, ends, timestep, low_rank = LADDER.values()
    assert not symmetric.inputs and not symmetric.model and not symmetric.methods
    assert symmetric.weights == {"scale_method": "mse"}
    assert replace(symmetric, inputs={"symmetric": False}) == affine
    assert replace(affine, methods=(SecondOrderRounding(),)) == gptq
    assert replace(gptq, model={"overrides": "ends_at_8_bits"}) == ends == PRESETS["low_bits"]
    assert (
        timestep.timestep_aware
        and replace(timestep, timestep_aware=False, description=ends.description) == ends
    )
    assert replace(ends, methods=(LowRankBranch(),), description=low_rank.description) == low_rank


def test_ranges_are_named_by_what_they_change():
    assert range_recipe(2.4) == ("low_bits", PRESETS["low_bits"])
    assert range_recipe(2.4, timestep_aware=True) == ("timestep_low_bits", PRESETS["timestep_low_bits"])
    name, recipe = range_recipe(0, symmetric=True)
    assert name == "low_bits symmetric max" and recipe.inputs == {"symmetric": True}
    assert recipe.calibrator == {"act_scale_policy": "max", "act_update_policy": "maximum"}
    name, recipe = range_recipe(2.4, merged=True)
    assert name == "low_bits merged"
    assert recipe.calibrator == {"act_scale_policy": "mse", "act_update_policy": "merged"}
    name, recipe = range_recipe(3.0)
    assert name == "low_bits p3" and recipe.inputs == {"symmetric": False, "norm": 3.0}
    assert PRESETS["low_bits"].inputs == {"symmetric": False}


def test_each_norm_comes_with_each_kind_of_range():
    variants, recipes = range_variants([2.4, 4.0], 5, 4, 3)
    assert [v.label for v in variants] == [
        "low_bits W4A3", "low_bits symmetric W4A3", "low_bits merged W4A3", "timestep_low_bits k5 W4A3",
        "low_bits p4 W4A3", "low_bits symmetric p4 W4A3", "low_bits merged p4 W4A3",
        "timestep_low_bits p4 k5 W4A3",
    ]  # fmt: skip
    assert {v.recipe for v in variants} == recipes.keys()
    assert len(range_variants([2.4], 1, 4, 4)[0]) == 3
    assert len(range_variants([0], 1, 4, 4)[0]) == 2


def test_a_path_is_recorded_as_means_over_images():
    run = Rows()
    errors = PathErrors(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((2, 2), -0.02), torch.tensor([0.5, 1.5])
    )
    record_path(run, quantized("low_bits", 4, 4), errors, ["a", "b"])
    values = {key[0]: found.value for key, found in run.rows.items()}
    assert values == pytest.approx({"step error": 2.5, "gain": -2.0, "final latent error": 1.0})
    assert run.rows["final latent error",].n == 2
