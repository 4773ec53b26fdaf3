"""Times of one UNet at a time, against the model's own in the same rounds."""

import copy
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from sdcomp.evaluation import Estimate
from sdcomp.study import PairedTimes
from sdcomp.study.times import PARTS, at_steps


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """A clock that only `Slower` and its own readings move, so that no other program changes a time."""
    now = SimpleNamespace(seconds=0.0)

    def read():
        now.seconds += 0.001
        return now.seconds

    monkeypatch.setattr(time, "perf_counter", read)
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(now, "seconds", now.seconds + seconds))


class Slower(nn.Module):
    def __init__(self, unet, seconds):
        super().__init__()
        self.unet, self.seconds, self.calls = unet, seconds, []

    def forward(self, latents, timesteps, context):
        self.calls.append((latents.shape, timesteps, context.shape, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return self.unet(latents, timesteps, context)


@pytest.fixture
def clock(small):
    return PairedTimes(small.replace(unet=Slower(small.unet, 0.1)), 3, images=2)


def test_a_step_is_timed_with_guidance_and_all_of_the_context(clock, small):
    slow = Slower(small.unet, 0.2)
    seconds, ratio = clock.step(slow)
    assert seconds.n == ratio.n == 3
    assert 0.2 < seconds.value < 0.21 and 1.9 < ratio.value < 2
    assert seconds.low <= seconds.value <= seconds.high
    length, width = small.config.text["max_position_embeddings"], small.config.unet.context_dim
    assert set(slow.calls) == {((4, 4, 16, 16), 500, (4, length, width), False)}
    # As many calls of the model's own, in the same rounds.
    assert len(slow.calls) == len(clock.sd.unet.calls) >= 3


def test_a_generation_has_the_shares_of_its_parts_and_a_ratio_to_the_models_own(clock, small):
    slower = Slower(small.unet, 0.2)
    seconds, shares, ratio = clock.components(slower, ["a star"] * 2, steps=2, guidance_scale=1.0)
    assert tuple(seconds) == (*shares, "total") == PARTS
    assert 0.4 < seconds["UNet"].value < seconds["total"].value and shares["UNet"].high < 1
    # Two steps of 0.2 s over two of 0.1 s, less what the rest takes.
    assert ratio.low <= ratio.value <= ratio.high and 1.7 < ratio.value < 2 and ratio.n == 3


def test_the_ratio_of_generations_is_taken_within_a_round(clock, small, monkeypatch):
    # The machine is four times slower in the second round, and both UNets with it.
    totals = pd.DataFrame({"variant": ["baseline", "variant"] * 3, "total": [1.0, 0.8, 4.0, 3.2, 1.0, 0.8]})
    times = totals.assign(**dict.fromkeys(PARTS[:-1], totals["total"] / 2))
    monkeypatch.setattr("sdcomp.study.times.component_times", lambda *_, **__: times)
    _, shares, ratio = clock.components(small.unet, ["a star"])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.8, 0.8, 0.8))
    assert shares["UNet"].low == shares["UNet"].high == 0.5


def test_inputs_follow_the_models_type_and_the_seed(small):
    half = copy.deepcopy(small).to(torch.bfloat16)
    latents, _, context = PairedTimes(half, 1, images=1).inputs
    assert latents.dtype == context.dtype == torch.bfloat16
    one, same, other = (PairedTimes(small, 1, images=1, seed=seed).inputs[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_time_of_an_image_follows_its_steps():
    call = Estimate(0.8, 0.7, 0.9, 7)
    assert at_steps(call, 20, 20) == call
    few = at_steps(call, 5, 20)
    assert (few.value, few.low, few.high, few.n) == pytest.approx((0.2, 0.175, 0.225, 7))
