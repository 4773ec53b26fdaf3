"""Time variants in alternation, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch

from sdcomp.evaluation.confidence_intervals import LEVEL, Estimate

Key = TypeVar("Key", bound=Hashable)
ENOUGH_TIMES = 6
"""Fewer measurements of a time have no 95 % interval of their median, only a range."""


def interleaved_times(
    variants: dict[Key, Callable[[], Any]],
    repeats: int = 7,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[Key, np.ndarray]:
    """Seconds of each of `repeats` calls, `(repeats,)` for each variant.

    A round calls every variant once; every second round goes backwards. The first `warmup` rounds are
    dropped. The clock waits for `device`, the one that the calls compute on. Raises ValueError for fewer
    than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    seconds: dict[Key, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        order = list(variants.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            begin = clock(device)
            call()
            elapsed = clock(device) - begin
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: np.array(values) for name, values in seconds.items()}


def median(values: np.ndarray, baseline: np.ndarray | None = None) -> Estimate:
    """The median of repeated measurements with its confidence interval.

    The interval is the narrowest symmetric pair of order statistics that covers the median with at least
    95 % probability (Conover 1999, section 3.2). Fewer than 6 measurements have no such pair; their interval
    is their range, which covers the median with 75 % (3 measurements), 88 % (4) or 94 % (5). One or two have
    no interval (NaN). With a `baseline` of the same rounds, the result is the median of the ratios
    `values / baseline`, round by round.
    """
    data = np.sort(values if baseline is None else values / baseline)
    n, left = data.size, 0
    if n < 3:
        return Estimate(float(np.median(data)), np.nan, np.nan, n)
    # The pair that leaves out i values at each end misses the median with 2 P(binomial(n, 1/2) <= i).
    while 2 * sum(math.comb(n, i) for i in range(left + 2)) <= (1 - LEVEL) * 2**n:
        left += 1
    return Estimate(float(np.median(data)), float(data[left]), float(data[n - 1 - left]), n)


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds of a monotonic clock, read after `device` has finished its work."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
