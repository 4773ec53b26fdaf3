"""Distances between sets of images against torchmetrics, and noise errors against known ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sdcomp.errors import UserError
from sdcomp.evaluation import (
    cached_trace,
    frechet_distance,
    kid_values,
    load_images,
    noise_mse,
    paired_difference,
)


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


def test_paired_kid_leaves_the_pairs_out():
    x = sample(80)
    near = x + 0.05 * sample(80, seed=3)
    # Images from the same noise resemble each other, so with the pairs the distance is negative.
    assert kid_values(near, x).mean() < -0.05
    assert abs(kid_values(near, x, paired=True).mean().item()) < 0.01
    assert kid_values(sample(80, shift=0.5, seed=4), x, paired=True).mean() > 0.05


@pytest.mark.parametrize(
    ("x", "y", "options"),
    [
        (sample(2), sample(9), {}),
        (sample(9), sample(9, d=5), {}),
        (sample(9), sample(8), {"paired": True}),
    ],
)
def test_kid_refuses_sets_that_are_too_small_or_do_not_fit(x, y, options):
    with pytest.raises(ValueError, match=r"KID needs at least 3|do not fit"):
        kid_values(x, y, **options)


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
