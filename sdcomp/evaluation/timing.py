"""Times of variants, measured in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch

from sdcomp.evaluation.statistics import Estimate

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


def median(values: np.ndarray, baseline: np.ndarray | None = None) -> Estimate:
    """The median of repeated measurements with its 95 % interval, between two of them.

    The narrowest symmetric pair of order statistics that covers the median with at least 95 % probability
    (Conover 1999, section 3.2). Fewer than 6 measurements have no such pair: then it is their range, which
    covers it with 75 % at 3 and 94 % at 5. With `baseline`, of the same rounds, the median of the ratios
    `values / baseline`, round by round.
    """
    data = np.sort(values if baseline is None else values / baseline)
    n, left = data.size, 0
    # Outside the pair without the i smallest and largest: 2 P(binomial(n, 1/2) <= i).
    while 2 * sum(math.comb(n, i) for i in range(left + 2)) <= 0.05 * 2**n:
        left += 1
    return Estimate(float(np.median(data)), float(data[left]), float(data[n - 1 - left]), n)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
