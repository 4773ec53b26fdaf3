"""What a study is going to run, and what is asked of the loaded model before hours of work."""

from __future__ import annotations

import dataclasses

import pytest

from sdcomp.errors import UserError
from sdcomp.quantization import PRESETS, Calibrator, TimeStepCalibratedQuantModel
from sdcomp.study import (
    FP32,
    bit_pairs,
    check_calibration,
    needs_intervals,
    pruned,
    pruned_variants,
    quantized,
)
from sdcomp.study.plan import plain_control


@pytest.mark.parametrize(
    ("arguments", "variants"),
    [
        ((0.3, False, "mask"), [pruned("unstructured", 0.3)]),
        (([0.1, 0.0], True, "mask"), [pruned("masked channels", 0.1), FP32]),
        ((0.2, True, "remove", 50), [pruned("removed", 0.2, recover_steps=50)]),
        (([], True, "remove"), []),
    ],
)
def test_parameters_name_the_pruned_variants(arguments, variants):
    assert pruned_variants(*arguments) == variants


@pytest.mark.parametrize(
    ("weights", "activations", "pairs"),
    [
        (8, 4, [(8, 4)]),
        ([8, 6], 4, [(8, 4), (6, 4)]),
        (8, [6, 4], [(8, 6), (8, 4)]),
        ([8, 6], [4, 5], [(8, 4), (6, 5)]),
        ([8], [4, 5], [(8, 4), (8, 5)]),
    ],
)
def test_bits_go_along_pair_by_pair(weights, activations, pairs):
    assert bit_pairs(weights, activations) == pairs


@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_calibration_that_passes_the_check_meets_every_interval(small, steps, k):
    check_calibration(small, steps, "ddim", [k])
    model = TimeStepCalibratedQuantModel(small.unet, timesteps=steps, k=k)
    Calibrator(small, model).calibrate("a star", steps=steps, sampler="ddim", guidance_scale=1.0)
    assert model.calibrated


def test_intervals_that_no_step_falls_into_are_refused_before_they_are_calibrated(small):
    # Steps of 3 out of 1000 timesteps, 300 times: SD 1.x's spacing leaves the first tenth out.
    config = dataclasses.replace(
        small.config, schedule=dataclasses.replace(small.config.schedule, timestep_spacing="leading")
    )
    leading = small.replace(config=config)
    check_calibration(leading, 300, "ddim", [5])
    with pytest.raises(UserError, match="300 calibration steps of ddim fall into 9 of k=10") as caught:
        check_calibration(leading, 300, "ddim", [5, 10])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="calibration_steps=600 cannot be run with ddim: steps must"):
        check_calibration(leading, 600, "ddim")


def test_a_filter_that_matches_no_layer_is_refused(small):
    check_calibration(small, 10, "ddim", filters=["out", "*.to_v"])
    with pytest.raises(UserError, match="filter 'nope' matches no layer") as caught:
        check_calibration(small, 10, "ddim", filters=["out", "nope"])
    assert "\n" not in str(caught.value)


def test_only_presets_with_equal_intervals_need_each_of_them():
    equal = {name for name in PRESETS if needs_intervals(name)}
    assert equal >= {"timestep_mse", "timestep_mse_filtered"}
    assert not equal & {"weights_only", "max", "mse", "timestep_optimal", "timestep_split"}


@pytest.mark.parametrize("execution", ["simulated", "int8"])
def test_the_plain_control_has_one_range_for_all_timesteps(execution):
    sparse = pruned("unstructured", 0.2)
    aware = quantized("timestep_mse", 8, 8, 10, of=sparse, execution=execution)
    assert plain_control(aware) == quantized("mse", 8, 8, of=sparse, execution=execution)
    for recipe in ("mse", "weights_gptq", "timestep_optimal"):  # these have no such preset
        assert plain_control(quantized(recipe, 8, 8)) is None
    assert plain_control(sparse) is None
