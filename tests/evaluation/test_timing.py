"""Interleaved timing: the order of calls, and ratios on a machine that slows down."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sdcomp
from sdcomp.evaluation import (
    component_times,
    interleaved_times,
    layer_profile,
    macs,
    median,
    timing,
)


def test_rounds_alternate_and_the_first_ones_are_dropped(monkeypatch):
    clock = iter(np.arange(100) ** 2.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls = []
    found = interleaved_times({k: (lambda k=k: calls.append(k)) for k in "abc"}, repeats=2, warmup=1)
    assert "".join(calls) == "abccbaabc"
    # The i-th call lasts from (2 i)^2 to (2 i + 1)^2, that is 4 i + 1.
    assert {name: list(times) for name, times in found.items()} == {
        "a": [21, 25],
        "b": [17, 29],
        "c": [13, 33],
    }
    with pytest.raises(ValueError, match="at least 1"):
        interleaved_times({}, repeats=0)


def test_a_slower_machine_does_not_change_a_ratio():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 21)
    dense, pruned = drift * rng.normal(1, 0.01, 21), drift * rng.normal(0.8, 0.01, 21)
    ratio = median(pruned, dense)
    assert ratio.low < 0.8 < ratio.high and ratio.high - ratio.low < 0.03 and ratio.n == 21
    alone = median(dense)
    assert alone.value == pytest.approx(np.median(dense)) and alone.high - alone.low > 0.3


@pytest.mark.parametrize(
    ("n", "low", "high"), [(3, 1, 3), (5, 1, 5), (6, 1, 6), (8, 1, 8), (9, 2, 8), (20, 6, 15)]
)
def test_the_interval_of_a_median_agrees_with_tables(n, low, high):
    # From tables of the sign test's critical values.
    found = median(np.random.default_rng(n).permutation(n) + 1.0)
    assert (found.low, found.value, found.high, found.n) == (low, (n + 1) / 2, high, n)


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_measurements_have_no_interval(n):
    found = median(np.arange(n) + 1.0)
    assert (found.value, found.n) == ((n + 1) / 2, n) and np.isnan([found.low, found.high]).all()


def test_the_interval_of_a_median_covers_it_in_95_of_100_experiments():
    draws = np.random.default_rng(0).exponential(size=(4000, 7))
    found = [median(row) for row in draws]
    covered = np.mean([e.low <= np.log(2) <= e.high for e in found])
    assert 0.975 < covered < 0.993  # 1 - 2 / 2**7


@pytest.mark.parametrize("device", ["cuda:1", torch.device("cuda", 1)])
def test_the_clock_waits_for_the_given_device(monkeypatch, device):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    interleaved_times({"a": lambda: waits.append("call")}, repeats=2, warmup=0, device=device)
    assert waits == 2 * [torch.device("cuda:1"), "call", torch.device("cuda:1")]
    waits.clear()
    interleaved_times({"a": lambda: None}, repeats=1, device="cpu")
    assert not waits


@pytest.mark.cuda
def test_the_clock_waits_for_the_device_that_computes():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    a = torch.randn(4096, 4096, device=last)

    def work() -> None:
        for _ in range(20):
            a @ a

    launched = interleaved_times({"work": work}, repeats=3, device="cpu")["work"].min()
    torch.cuda.synchronize(last)
    assert interleaved_times({"work": work}, repeats=3, device=last)["work"].min() > 3 * launched


@pytest.mark.cuda
def test_layers_and_components_are_timed_on_the_device():
    sd = sdcomp.load("data/tiny", device="cuda")
    latents, context = torch.randn(8, 4, 16, 16, device="cuda"), torch.randn(8, 24, 128, device="cuda")
    with torch.no_grad():
        sd.unet(latents, 500, context)
    table = layer_profile(sd.unet, latents, 500, context)
    assert (table.seconds[:-1] > 0).all() and table.seconds.sum() < 1
    times = component_times({"plain": sd}, ["a star"], repeats=2, steps=3)
    assert (times["UNet"] > times["decoder"]).all()
    assert (times[["text encoder", "UNet", "decoder"]].sum(axis=1) < 1.1 * times["total"]).all()


@pytest.mark.cuda
def test_the_arithmetic_count_does_not_depend_on_the_device():
    sd = sdcomp.load("data/tiny")
    inputs = torch.randn(2, 4, 16, 16), torch.tensor(500), torch.randn(2, 24, 128)
    wanted = macs(sd.unet, *inputs)
    assert macs(sd.unet.cuda(), *(part.cuda() for part in inputs)) == wanted
