"""Times of variants, measured in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch

from sdcomp.evaluation.statistics import RESAMPLES, Estimate

Key = TypeVar("Key", bound=Hashable)


def interleaved_times(
    variants: dict[Key, Callable[[], Any]], repeats: int = 7, warmup: int = 2
) -> dict[Key, np.ndarray]:
    """Seconds of each of `repeats` calls, `(repeats,)` for each variant.

    A round calls every variant once; rounds alternate in direction. The first `warmup` rounds are thrown
    away. On CUDA the device is waited for. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    seconds: dict[Key, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        order = list(variants.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            _wait()
            begin = time.perf_counter()
            call()
            _wait()
            elapsed = time.perf_counter() - begin
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def median(values: np.ndarray, baseline: np.ndarray | None = None, seed: int = 0) -> Estimate:
    """The median of repeated measurements with its bootstrap 95 % interval.

    With `baseline`, of the same rounds, the median of the ratios `values / baseline`, round by round.
    """
    data = values if baseline is None else values / baseline
    draws = np.random.default_rng(seed).integers(0, data.size, (RESAMPLES, data.size))
    low, high = np.percentile(np.median(data[draws], axis=1), [2.5, 97.5])
    return Estimate(float(np.median(data)), float(low), float(high), data.size)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
