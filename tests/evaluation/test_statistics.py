"""Estimates and their intervals against their known properties."""

import math

import numpy as np
import pytest
import torch

from sdcomp.evaluation import Estimate, applicable, bootstrap, estimate, paired_difference, ssim


def test_for_many_values_the_interval_of_a_mean_is_the_normal_one():
    values = torch.from_numpy(np.random.default_rng(0).gamma(2.0, 1.5, 4000))
    mean = bootstrap(values)
    error = values.std(unbiased=False).item() / math.sqrt(4000)
    assert mean.n == 4000
    assert mean.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert mean.low == pytest.approx(mean.value - 1.96 * error, abs=0.15 * error)
    assert mean.high == pytest.approx(mean.value + 1.96 * error, abs=0.15 * error)


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(2)
    baseline = torch.from_numpy(rng.normal(20, 5, 60))
    variant = baseline - 0.5 + 0.2 * torch.from_numpy(rng.normal(size=60))
    difference = bootstrap(variant - baseline)
    assert difference.low < -0.5 < difference.high < -0.3
    assert difference.high - difference.low < 0.1 * (bootstrap(variant).high - bootstrap(variant).low)


def test_an_interval_is_reproducible_and_ordered_after_a_falling_transform():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert bootstrap(values) == bootstrap(values) == bootstrap(values, seed=0) != bootstrap(values, seed=1)
    plain, falling = bootstrap(values), bootstrap(values, lambda x: -np.log(x))
    assert falling.low < falling.value < falling.high
    assert falling.value == pytest.approx(-math.log(plain.value))
    assert (falling.low, falling.high) == pytest.approx(
        (-math.log(plain.high), -math.log(plain.low)), abs=1e-3
    )


def test_one_value_and_none():
    alone = bootstrap(torch.tensor([2.5]))
    assert (alone.value, alone.n) == (2.5, 1) and math.isnan(alone.low) and math.isnan(alone.high)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(torch.empty(0))
    assert str(Estimate(0.12345, 0.1, 0.2, 9)) == "0.123 [0.1, 0.2]"


def test_the_interval_is_that_of_all_resamples_drawn_at_once():
    values = torch.randn(137, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    means = values.numpy()[np.random.default_rng(5).integers(0, 137, (2000, 137))].mean(1)
    found = bootstrap(values, seed=5)
    # Student's quantile for 136 degrees of freedom is 1.97756. A resample's variance is 136 / 137 of the
    # unbiased one.
    tail = 50 * math.erfc(1.97756 * math.sqrt(137 / 136 / 2))
    assert [found.low, found.high] == pytest.approx(
        np.percentile(means, [tail, 100 - tail]).tolist(), rel=1e-4
    )


def test_images_of_one_scene_are_resampled_together():
    torch.manual_seed(0)
    scenes = torch.randn(40)
    repeated = scenes.repeat_interleave(10)
    groups = [f"scene {i // 10}" for i in range(400)]
    few, many = bootstrap(scenes), bootstrap(repeated, groups=groups)
    assert many.value == pytest.approx(few.value) and (few.n, many.n) == (40, 400)
    # Ten copies hold no more information than one, but would seem to if they were independent.
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.1)
    # The names of the scenes do not matter.
    assert bootstrap(repeated, groups=[999 - i // 10 for i in range(400)]) == many
    plain = bootstrap(repeated)
    assert plain.high - plain.low == pytest.approx((few.high - few.low) / math.sqrt(10), rel=0.15)


def test_values_that_do_not_apply_are_left_out():
    values = torch.tensor([1.0, math.nan, 3.0, math.nan])
    kept, groups = applicable(values, ["a", "b", "c", "d"])
    assert kept.tolist() == [1.0, 3.0] and groups == ["a", "c"]
    assert (bootstrap(kept, groups=groups).value, bootstrap(kept, groups=groups).n) == (2.0, 2)


def test_values_that_do_not_go_together_are_refused():
    values = torch.arange(4.0)
    for baseline in (torch.zeros(1), torch.zeros(5)):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_difference(values, baseline)
    right = values > 1
    for pair in ((right, values), (values, right)):  # percentage points, or differences of numbers?
        with pytest.raises(ValueError, match="convert one side: torch"):
            paired_difference(*pair)
    assert paired_difference(values.int(), values.double()).value == 0
    with pytest.raises(ValueError, match="3 groups for 4 values"):
        bootstrap(values, groups=["a", "b", "c"])
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="floating point"):
        ssim((255 * images).byte(), images)


def test_a_share_has_wilsons_interval():
    right = torch.ones(32, dtype=torch.bool)
    # 32 of 32: Wilson's 95 % interval is 89.3 to 100 % (z^2 = 3.84: 32 / 35.84).
    assert estimate(right).low == pytest.approx(89.3, abs=0.05)
    assert estimate(right).high == pytest.approx(100)
    assert estimate(~right).high == pytest.approx(10.7, abs=0.05)
    # Eight scenes, four images each.
    assert estimate(right, [i % 8 for i in range(32)]).low == pytest.approx(100 * 8 / (8 + 3.8416), abs=0.05)
    right[:16] = False
    # 16 of 32: 33.63 to 66.37 %.
    assert (estimate(right).value, estimate(right).low) == pytest.approx((50, 33.63), abs=0.01)
    assert math.isnan(estimate(right, ["one scene"] * 32).low)


def test_without_a_changed_answer_the_interval_is_not_zero():
    right = torch.arange(256) % 2 == 0
    change = paired_difference(right, right)
    # At a difference d the most likely rates are d and 0. So n d^2 / (d - d^2) is 3.84 at the ends.
    assert change.value == 0 and change.low == pytest.approx(-change.high)
    assert change.high == pytest.approx(100 * 3.8415 / (256 + 3.8415), abs=1e-3)
    flipped = right.clone()
    flipped[0] = False
    one = paired_difference(flipped, right)
    assert (one.value, one.low, one.high) == pytest.approx((-0.39, -2.18, 1.09), abs=0.01)
    values = torch.rand(32)
    assert paired_difference(values + 1, values).value == pytest.approx(1)


def test_differences_of_paired_shares_have_a_width_though_all_are_equal():
    none = torch.zeros(64, dtype=torch.int8)
    found = paired_difference(none, none)
    assert found.value == 0 and found.low == -found.high and 3 < found.high < 6
    with pytest.raises(ValueError, match="convert one side"):
        paired_difference(none, none.double())
