"""Numbers with their interval: bootstrap over images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic over `n` images with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    values: Tensor, transform: Callable[[np.ndarray], np.ndarray] | None = None, seed: int = 0
) -> Estimate:
    """The mean of `values` `(n,)`, put through `transform` if given, with its percentile interval.

    Images are resampled with replacement (Efron 1979). For a paired comparison give the differences.
    Raises ValueError for an empty tensor.
    """
    data = values.double().cpu().numpy()
    if data.size == 0:
        raise ValueError("an estimate needs at least one value")
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(0, data.size, data.size)].mean() for _ in range(RESAMPLES)])
    f = transform or (lambda x: x)
    low, high = np.sort(np.percentile(f(means), [2.5, 97.5]))
    return Estimate(float(f(data.mean())), float(low), float(high), data.size)
