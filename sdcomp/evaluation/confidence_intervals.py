"""The confidence level of all intervals, and estimates with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
"""The probability with which an interval contains the truth."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""An interval of a normal mean reaches this many standard errors to each side."""


@dataclass(frozen=True)
class Estimate:
    """A statistic over `n` images with its confidence interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def student(df: np.ndarray | float) -> np.ndarray:
    """What `Z` is for Student's t (Abramowitz & Stegun 1964, 26.7.5), to 1 % from df = 3 on."""
    z, df = Z, np.asarray(df, dtype=float)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))
