"""What is asked of a loaded model before a calibration, and how UNets are pruned for studies."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import sdcomp
from sdcomp.errors import UserError
from sdcomp.pruning import count_zeros, prune_structured, prune_unstructured
from sdcomp.quantization import PRESETS, Calibrator, TimeStepCalibratedQuantModel
from sdcomp.study import bit_pairs, check_calibration, needs_intervals, pruned


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


def test_presets_with_equal_intervals():
    equal = {name for name in PRESETS if needs_intervals(name)}
    assert equal == {"timestep_mse", "timestep_mse_filtered"}


def test_a_study_prunes_as_the_package_does(small, tmp_path):
    run = SimpleNamespace(folder=tmp_path, progress=False, parameters={"n_images": 1, "seed": 0})
    wanted = {
        ("unstructured", "layer", "l2"): prune_unstructured(small.unet, 0.3),
        ("unstructured", "global", "l2"): prune_unstructured(small.unet, 0.3, scope="global"),
        ("masked channels", "layer", "l1"): prune_structured(small.unet, 0.3, n=1),
        ("removed", "layer", "l1"): prune_structured(small.unet, 0.3, mode="remove", criterion="l1"),
    }
    for (kind, scope, norm), unet in wanted.items():
        state = pruned(run, small, kind, 0.3, scope=scope, norm=norm).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in unet.state_dict().items())
    with pytest.raises(KeyError):
        pruned(run, small, "nothing", 0.3)


def test_a_recovery_is_kept_in_the_runs_folder_and_changes_no_zero(tmp_path):
    sd = sdcomp.load("data/tiny")
    run = SimpleNamespace(
        folder=tmp_path, progress=False, parameters={"n_images": 1, "seed": 0},
        generation=lambda sd: {"guidance_scale": 1.0},
    )  # fmt: skip
    plain = pruned(run, sd, "removed", 0.9)
    made = pruned(run, sd, "removed", 0.9, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["removed_0.9_2.ckpt"]
    assert count_zeros(made).total == count_zeros(plain).total < count_zeros(sd.unet).total / 2
    assert not torch.equal(next(made.parameters()), next(plain.parameters()))
