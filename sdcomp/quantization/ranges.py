"""Histograms of magnitudes, and the clipping range with the least error found from a histogram.

A histogram has `BINS` equal bins over [0, R). Whatever is spread over these bins, the error of clipping
at a fixed share of R is linear in the counts: one table for each number of bits, times the histogram,
gives the error of every candidate at once, and the tensor itself is read only once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

BINS = 2048
NORM = 2.4
"""The exponent p of the L_p error: between 2, which keeps outliers, and more, which serves only them."""

CANDIDATES = 1.02 ** -torch.arange(256, dtype=torch.float64)
"""Clipping ranges that are tried, as shares of R: from 1 down to 0.6 % in steps of 2 %."""


@lru_cache(maxsize=32)
def error_table(qmax: int, norm: float = NORM, device: str = "cpu") -> Tensor:
    """Error of one value of each bin at each candidate: `(candidates, BINS)` float32, in units of R^p.

    `qmax` is the largest integer, 2^(n-1) - 1. Values are taken as spread evenly within their bin.
    """
    parts = 8
    values = (torch.arange(BINS * parts, dtype=torch.float64) + 0.5) / (BINS * parts)
    step = CANDIDATES[:, None] / qmax
    error = (values / step).round_().clamp_(max=qmax).mul_(step).sub_(values).abs_().pow_(norm)
    return error.unflatten(1, (BINS, parts)).mean(dim=2).float().to(device)


def best_clip(counts: Tensor, qmax: int) -> Tensor:
    """The candidate with the least L_p error for histograms `(..., BINS)`: `(...)` indices."""
    errors = counts.float() @ error_table(qmax, device=str(counts.device)).T
    return errors.argmin(dim=-1)


def channel_clips(magnitudes: Tensor, qmax: int) -> Tensor:
    """The range with the least L_p error for each row of magnitudes `(rows, n)`: `(rows,)` float32."""
    clips = []
    for rows in magnitudes.split(1024):
        top = rows.amax(dim=1, keepdim=True)
        bins = (rows * (BINS / top)).nan_to_num_(0).clamp_(max=BINS - 1).int()
        bins += BINS * torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None]
        # A zero is exact at any range, wherever its bin ends.
        counts = torch.bincount(bins[rows > 0], minlength=BINS * len(rows)).view(len(rows), BINS)
        shares = CANDIDATES.to(rows)[best_clip(counts, qmax)]
        clips.append(shares * top[:, 0])
    return torch.cat(clips)


class MagnitudeHistogram:
    """Counts of |x| over a range [0, 2^e), which doubles, merging its bins in pairs, when it must grow.

    The ranges being powers of two, what is counted does not depend on the order in which it came.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.exponent: int | None = None
        self.total = 0
        self.maximum = 0.0

    @classmethod
    def of(cls, x: Tensor) -> MagnitudeHistogram:
        """The histogram of one tensor. Raises ValueError for values that are not finite."""
        made = cls()
        made.total = x.numel()
        # In the order of memory: nothing is copied for channels-last maps.
        if x.dim() == 4 and not x.is_contiguous():
            x = x.movedim(1, -1)
        magnitudes = x.reshape(-1).float().abs()
        made.maximum = magnitudes.max().item() if made.total else 0.0
        if not math.isfinite(made.maximum):
            raise ValueError("values that are not finite")
        if made.maximum > 0:
            made.exponent = max(math.frexp(made.maximum)[1], -100)
            zeros = made.total - int(torch.count_nonzero(magnitudes))
            bins = magnitudes.mul_(BINS * 2.0**-made.exponent).to(torch.int16)
            made.counts = torch.bincount(bins, minlength=BINS).cpu()
            made.counts[0] -= zeros  # exact at any range
        return made

    def at(self, exponent: int) -> Tensor:
        """The counts over the range [0, 2^exponent), which is at least the own one: `(BINS,)` int64."""
        if self.exponent is None or exponent == self.exponent:
            return self.counts
        merged = 2 ** (exponent - self.exponent)
        counts = torch.zeros_like(self.counts)
        if merged >= BINS:
            counts[0] = self.counts.sum()
        else:
            counts[: BINS // merged] = self.counts.view(-1, merged).sum(dim=1)
        return counts

    def add(self, other: MagnitudeHistogram) -> None:
        """Count what `other` counted too."""
        if other.exponent is not None:
            exponent = max(other.exponent, other.exponent if self.exponent is None else self.exponent)
            self.counts = self.at(exponent) + other.at(exponent)
            self.exponent = exponent
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)

    def clip(self, policy: str, qmax: int) -> float:
        """The clipping range by `max` or `mse`; 0 where there are only zeros."""
        if policy == "max" or self.exponent is None:
            return self.maximum
        share = CANDIDATES[best_clip(self.counts, qmax)].item()
        return min(share * 2.0**self.exponent, self.maximum)

    def beyond(self, clip: float) -> int:
        """How many values lie beyond a clipping range, to the nearest bin; none where it is the maximum."""
        if self.exponent is None or clip >= self.maximum:
            return 0
        return int(self.counts[round(clip * BINS * 2.0**-self.exponent) :].sum())
