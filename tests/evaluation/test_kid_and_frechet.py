"""Distances between sets of images against torchmetrics."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from sdcomp.evaluation import (
    frechet_distance,
    kid_values,
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


def test_the_bias_of_the_frechet_distance():
    n, d, variance = 200, 16, 4
    pairs = [(2 * sample(n, d, seed=i), 2 * sample(10000, d, seed=100 + i)) for i in range(10)]
    found = np.mean([frechet_distance(x, y) for x, y in pairs])
    assert found == pytest.approx(variance * d * (d + 5) / (4 * n), rel=0.1)


def test_the_frechet_distance_agrees_with_torchmetrics():
    x, y = sample(50), sample(70, shift=0.3, seed=1) @ torch.diag(torch.linspace(0.5, 2, 6))
    theirs = FrechetInceptionDistance(Given(6), input_img_size=(1, 1, 6), normalize=False)
    theirs.set_dtype(torch.float64)
    theirs.update(y.double(), real=True)
    theirs.update(x.double(), real=False)
    assert frechet_distance(x, y) == pytest.approx(theirs.compute().item(), rel=1e-6)
    with pytest.raises(ValueError, match="6 features needs more than 6 images, not 6"):
        frechet_distance(x, y[:6])
