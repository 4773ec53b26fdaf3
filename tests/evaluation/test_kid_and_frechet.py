"""Distances between sets of images against torchmetrics, and noise errors against known ones."""

import numpy as np
import pytest
import torch
from diffusers_keys import diffusers_scheduler
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sdcomp.errors import UserError
from sdcomp.evaluation import (
    branch_errors,
    cached_trace,
    frechet_distance,
    kid_values,
    load_images,
    noise_mse,
    paired_difference,
    path_predictions,
    step_weights,
)
from sdcomp.model.config import ScheduleConfig
from sdcomp.model.samplers import SAMPLERS
from sdcomp.model.schedule import NoiseSchedule


class Given(nn.Module):
    """Replaces a feature extractor: the "images" are features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features.flatten(1)


def sample(n, d=6, shift=0.0, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_kid_agrees_with_torchmetrics_on_all_images():
    x, y = sample(40), sample(40, shift=0.4, seed=1)
    theirs = KernelInceptionDistance(Given(6), subsets=1, subset_size=40)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    assert kid_values(x, y).mean().item() == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_kid_is_unbiased_and_its_spread_is_that_of_new_samples():
    y = sample(400, shift=0.3, seed=99)
    estimates, claimed = [], []
    for seed in range(200):
        values = kid_values(sample(60, seed=seed), y)
        estimates.append(values.mean().item())
        claimed.append(values.std().item() / 60**0.5)
    truth = kid_values(sample(4000, seed=1000), y).mean().item()
    assert np.mean(estimates) == pytest.approx(truth, abs=3 * np.std(estimates) / 200**0.5)
    assert np.mean(claimed) == pytest.approx(np.std(estimates), rel=0.15)


def test_a_paired_difference_of_kids_sees_a_small_shift():
    y, x = sample(200, seed=5), sample(100, shift=0.3)
    change = paired_difference(kid_values(x + 0.1, y), kid_values(x, y))
    assert change.low > 0
    assert change.value == pytest.approx((kid_values(x + 0.1, y) - kid_values(x, y)).mean().item())


def test_pairs_of_one_scene_are_left_out():
    x = sample(80)
    near = x + 0.05 * sample(80, seed=3)
    scenes = list(range(80))
    # Images of one scene resemble each other, so with such pairs the distance is negative.
    assert kid_values(near, x).mean() < -0.05
    assert abs(kid_values(near, x, scenes, scenes).mean().item()) < 0.01
    assert kid_values(sample(80, shift=0.5, seed=4), x, scenes, scenes).mean() > 0.05
    # Within a set too: two images of each scene.
    kept, left_out = [], []
    for seed in range(40):
        scene, y = sample(40, seed=seed), sample(60, seed=1000 + seed)
        pairs = torch.cat([scene, scene + 0.05 * sample(40, seed=500 + seed)])
        kept.append(kid_values(pairs, y).mean().item())
        left_out.append(kid_values(pairs, y, [*range(40), *range(40)]).mean().item())
    error = np.std(left_out) / 40**0.5
    assert abs(np.mean(left_out)) < 3 * error < np.mean(kept)


def test_kid_with_scenes_is_the_mean_over_pairs_of_different_scenes():
    x, y, a, b = sample(7), sample(9, seed=1), [0, 0, 1, 2, 3, 4, 5], [0, 1, 1, 6, 7, 8, 9, 9, 9]

    def mean(u, v, first, second):
        kernels = [
            (p @ q / 6 + 1).item() ** 3
            for p, i in zip(u, first, strict=True)
            for q, j in zip(v, second, strict=True)
            if i != j
        ]
        return np.mean(kernels)

    def kid(rows):
        u, c = x[rows], [a[i] for i in rows]
        return mean(u, u, c, c) - 2 * mean(u, y, c, b) + mean(y, y, b, b)

    rows = list(range(7))
    expected = [7 * kid(rows) - 6 * kid(rows[:i] + rows[i + 1 :]) for i in rows]
    assert kid_values(x, y, a, b).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("x", "y", "groups"),
    [
        (sample(2), sample(9), {}),
        (sample(9), sample(9, d=5), {}),
        (sample(9), sample(8), {"groups": range(8)}),
        (sample(9), sample(8), {"reference_groups": [0, 1] * 4}),
    ],
)
def test_kid_refuses_sets_that_are_too_small_or_do_not_fit(x, y, groups):
    with pytest.raises(ValueError, match=r"KID needs at least 3|do not fit"):
        kid_values(x, y, **groups)


def test_the_frechet_distance_agrees_with_torchmetrics():
    x, y = sample(50), sample(70, shift=0.3, seed=1) @ torch.diag(torch.linspace(0.5, 2, 6))
    theirs = FrechetInceptionDistance(Given(6), input_img_size=(1, 1, 6), normalize=False)
    theirs.set_dtype(torch.float64)
    theirs.update(y.double(), real=True)
    theirs.update(x.double(), real=False)
    assert frechet_distance(x, y) == pytest.approx(theirs.compute().item(), rel=1e-6)
    with pytest.raises(ValueError, match="6 features needs more than 6 images, not 6"):
        frechet_distance(x, y[:6])


def test_a_folder_of_images_becomes_a_batch(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(tmp_path, 8)
    assert images.shape == (2, 3, 8, 8) and (images[0] == 1).all()
    middle = torch.from_numpy(pixels[:, 2:10]).permute(2, 0, 1) / 255
    assert torch.allclose(images[1], middle, atol=1e-6)
    assert load_images(tmp_path, 4).shape == (2, 3, 4, 4)
    assert torch.equal(load_images(tmp_path / "b.png", 8), images[1:])
    (tmp_path / "c.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"c\.png cannot be read as an image"):
        load_images(tmp_path, 8)
    with pytest.raises(UserError, match="no image and no folder"):
        load_images(tmp_path / "nowhere", 8)


class Off(nn.Module):
    """The UNet with a constant added to its prediction, the same for prompts and negative prompts."""

    def __init__(self, unet, error):
        super().__init__()
        self.unet, self.error = unet, error

    def forward(self, latents, timesteps, context):
        return self.unet(latents, timesteps, context) + self.error * timesteps / 1000


def test_noise_errors_are_measured_step_by_step(small, tmp_path):
    prompts = ["a small red star", "a ring", "two stars"]
    settings = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2, "seed": 1}
    trace = cached_trace(small, prompts, folder=tmp_path, **settings)
    again = cached_trace(small, prompts, folder=tmp_path, **settings)
    assert torch.equal(trace.latents, again.latents) and torch.equal(trace.timesteps, again.timesteps)

    def errors(unet, **changes):
        return noise_mse(small, unet, prompts, trace, **{"guidance_scale": 3.0, "batch_size": 2, **changes})

    assert errors(small.unet).shape == (4, 3)
    # Here the last batch is not padded, so other kernels round it in another way.
    assert errors(small.unet).max() < 1e-9
    expected = (0.1 * trace.timesteps / 1000).square()[:, None].expand(4, 3)
    assert torch.allclose(errors(Off(small.unet, 0.1)), expected, rtol=1e-3)
    assert errors(small.unet, guidance_scale=1.0).min() > 1e-6
    assert errors(small.unet, negative_prompt="a red ring").min() > 1e-8


class OffForPrompts(Off):
    """The error is that of the second half of the rows, which are the prompts of a guided step."""

    def forward(self, latents, timesteps, context):
        found = self.unet(latents, timesteps, context)
        found[len(found) // 2 :] += self.error
        return found


def test_errors_of_branches_are_told_apart(small, tmp_path):
    prompts = ["a small red star", "a ring", "two stars"]
    settings = {"guidance_scale": 3.0, "batch_size": 2}
    trace = cached_trace(small, prompts, folder=tmp_path, steps=4, seed=1, **settings)

    def found(unet, **changes):
        return path_predictions(small, unet, prompts, trace, **settings | changes)

    whole = found(small.unet)
    assert whole.shape == (2, *trace.latents.shape)
    errors = branch_errors(found(OffForPrompts(small.unet, 0.1)), whole, 3.0)
    assert {name: values.shape for name, values in errors.items()} == dict.fromkeys(
        ("guided", "negative prompt", "prompt"), (4, 3)
    )
    # Guidance multiplies the error of the prompt's branch by its scale.
    assert errors["prompt"].numpy() == pytest.approx(0.01, rel=1e-4)
    assert errors["guided"].numpy() == pytest.approx(0.09, rel=1e-4)
    assert errors["negative prompt"].max() == 0
    # Without guidance there is one branch, and the guided prediction is its own.
    alone = branch_errors(found(Off(small.unet, 0.1), guidance_scale=1.0), whole[1:], 1.0)
    expected = (0.1 * trace.timesteps / 1000).square()[:, None].expand(4, 3)
    assert list(alone) == ["guided"] and torch.allclose(alone["guided"], expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("visited", [10, 6])
def test_the_weight_of_a_step_is_how_far_its_error_moves_the_final_latents(
    diffusers, monkeypatch, name, visited
):
    weights = step_weights(name, NoiseSchedule(ScheduleConfig()), 10, visited)
    assert weights.shape == (visited,)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(10, 1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def end(error_at=None):
        scheduler = diffusers_scheduler(diffusers, name, "leading", 10)
        latents = torch.ones(1, 4, 8, 8, dtype=torch.float64)
        for i in range(10 - visited, 10):
            found = predictions[i] + (0.5 if i == error_at else 0)
            latents = scheduler.step(found, scheduler.timesteps[i], latents).prev_sample
        return latents

    moved = [(end(i) - end()).mean().item() / 0.5 for i in range(10 - visited, 10)]
    assert weights.tolist() == pytest.approx(moved, rel=1e-4)
