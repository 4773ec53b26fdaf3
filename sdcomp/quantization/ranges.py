"""Histograms of values, and the clipping range with the least error found from a histogram.

A histogram has `BINS` equal bins of magnitudes over [0, R), for values above and below zero apart. Whatever
is spread over these bins, the error of clipping at a fixed share of R is linear in the counts: one table for
each number of bits, times the histogram, gives the error of every candidate at once, and the tensor itself
is read only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

BINS = 2048
NORM = 2.4
"""The exponent p of the L_p error. A larger p clips fewer outliers, since it weighs large errors more."""

CANDIDATES = 1.02 ** -torch.arange(256, dtype=torch.float64)
"""Clipping ranges that are tried, as shares of R: from 1 down to 0.6 % in steps of 2 %."""
_SHRINK = 1.03 ** -torch.arange(48)
"""Ranges that `search_ranges` tries, as shares of the whole: from 1 down to 25 %."""


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


def best_clip(counts: Tensor, qmax: int, norm: float = NORM) -> Tensor:
    """Return the indices in `CANDIDATES`, `(...)`, with the least L_p error for histograms `(..., BINS)`."""
    errors = counts.float() @ error_table(qmax, norm, str(counts.device)).T
    return errors.argmin(dim=-1)


def channel_clips(magnitudes: Tensor, qmax: int, norm: float = NORM) -> Tensor:
    """The range with the least L_p error for each row of magnitudes `(rows, n)`: `(rows,)` float32."""
    clips = []
    for rows in magnitudes.split(1024):
        top = rows.amax(dim=1, keepdim=True)
        bins = (rows * (BINS / top)).nan_to_num_(0).clamp_(max=BINS - 1).int()
        bins += BINS * torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None]
        # A zero is exact at any range, wherever its bin ends.
        counts = torch.bincount(bins[rows > 0], minlength=BINS * len(rows)).view(len(rows), BINS)
        shares = CANDIDATES.to(rows)[best_clip(counts, qmax, norm)]
        clips.append(shares * top[:, 0])
    return torch.cat(clips)


def search_ranges(
    rows: Tensor, low: Tensor, high: Tensor, simulate: Callable[[Tensor, Tensor, Tensor], Tensor], norm: float
) -> tuple[Tensor, Tensor]:
    """Shrink the range of each row `(rows, n)` by one factor at both ends, to where the L_p error is least.

    `low` and `high` `(rows,)` are the whole ranges; `simulate(rows, low, high)` rounds rows to a range.
    Returns the lower and the upper ends, `(rows,)` each. For few values a row; see `Histogram` for many.
    """
    best = torch.full_like(low, math.inf)
    share = torch.ones_like(low)
    for candidate in _SHRINK.tolist():
        error = simulate(rows, candidate * low, candidate * high).sub_(rows).abs_().pow_(norm).sum(dim=1)
        better = error < best
        best, share = torch.where(better, error, best), torch.where(better, candidate, share)
    return share * low, share * high


class Histogram:
    """Counts of values by sign and magnitude.

    `counts` `(2, BINS)`: magnitudes of the values at least zero, and of those below zero, over a range
    [0, 2^e). The range doubles, merging its bins in pairs, when it must grow. Ranges are powers of two, so
    the counts do not depend on the order in which values came. Exact zeros are not counted: they are exact
    in any range.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.int64)
        self.exponent: int | None = None
        self.total = 0
        self.lowest = self.highest = 0.0

    @property
    def maximum(self) -> float:
        """The largest magnitude."""
        return max(-self.lowest, self.highest)

    @property
    def magnitudes(self) -> Tensor:
        """The counts of magnitudes, `(BINS,)`."""
        return self.counts.sum(dim=0)

    @classmethod
    def of(cls, x: Tensor) -> Histogram:
        """Count the values of one tensor. Raises ValueError for values that are not finite."""
        made = cls()
        made.total = x.numel()
        # In the order of memory: nothing is copied for channels-last maps.
        if x.dim() == 4 and not x.is_contiguous():
            x = x.movedim(1, -1)
        x = x.reshape(-1).float()
        if made.total:
            low, high = torch.stack(x.aminmax()).tolist()
            made.lowest, made.highest = min(low, 0.0), max(high, 0.0)
            # NaN passes the comparisons above.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError("values that are not finite")
        if made.maximum > 0:
            made.exponent = max(math.frexp(made.maximum)[1], -100)
            zeros = made.total - int(torch.count_nonzero(x))
            bins = (x * (BINS * 2.0**-made.exponent)).to(torch.int16)
            # Truncation sends (-1, 0) to bin 0, so the sign is that of the value.
            negative = (x < 0).to(torch.int16)
            bins = bins.abs_().add_(negative, alpha=BINS)
            made.counts = torch.bincount(bins, minlength=2 * BINS).view(2, BINS).cpu()
            made.counts[0, 0] -= zeros
        return made

    def at(self, exponent: int) -> Tensor:
        """Return the counts over [0, 2^exponent), which holds the own range: `(2, BINS)` int64."""
        if self.exponent is None or exponent == self.exponent:
            return self.counts
        merged = 2 ** (exponent - self.exponent)
        counts = torch.zeros_like(self.counts)
        if merged >= BINS:
            counts[:, 0] = self.counts.sum(dim=1)
        else:
            counts[:, : BINS // merged] = self.counts.view(2, -1, merged).sum(dim=2)
        return counts

    def add(self, other: Histogram) -> None:
        """Count what `other` counted too."""
        if other.exponent is not None:
            exponent = max(other.exponent, other.exponent if self.exponent is None else self.exponent)
            self.counts = self.at(exponent) + other.at(exponent)
            self.exponent = exponent
        self.total += other.total
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)

    def range(
        self, policy: str, qmax: int, *, symmetric: bool = True, norm: float = NORM
    ) -> tuple[float, float]:
        """Return the ends of the clipping range by `max` or `mse`; (0, 0) where there are only zeros.

        `qmax` is the largest integer of a symmetric grid, or the largest code of an affine one.
        """
        if self.exponent is None:
            return 0.0, 0.0
        if not symmetric:
            return (self.lowest, self.highest) if policy == "max" else self._affine_range(qmax, norm)
        clip = self.maximum
        if policy == "mse":
            share = CANDIDATES[best_clip(self.magnitudes, qmax, norm)].item()
            clip = min(share * 2.0**self.exponent, clip)
        return -clip, clip

    def beyond(self, low: float, high: float) -> int:
        """Count the values beyond a clipping range, to the nearest bin; none where it holds all values."""
        if self.exponent is None:
            return 0
        ends = ((high, self.highest), (-low, -self.lowest))
        return sum(
            int(counts[round(clip * BINS * 2.0**-self.exponent) :].sum()) if clip < most else 0
            for counts, (clip, most) in zip(self.counts, ends, strict=True)
        )

    def _affine_range(self, qmax: int, norm: float) -> tuple[float, float]:
        """The range with the least L_p error, found for one end at a time until both stay."""
        centres = (torch.arange(BINS, dtype=torch.float32) + 0.5) * 2.0**self.exponent / BINS
        values, counts = (
            torch.cat([-centres.flip(0), centres]),
            torch.cat([self.counts[1].flip(0), self.counts[0]]),
        )
        values, counts = values[counts > 0], counts[counts > 0].float()
        shares = CANDIDATES[:128].float()
        low = torch.tensor(self.lowest)
        high = torch.tensor(self.highest)
        for _ in range(3):
            before = low, high
            if self.highest > 0:
                high = _best_end(values, counts, low, self.highest * shares, qmax, norm)
            if self.lowest < 0:
                low = -_best_end(-values, counts, -high, -self.lowest * shares, qmax, norm)
            if before == (low, high):
                break
        return low.item(), high.item()


def _best_end(values: Tensor, counts: Tensor, low: Tensor, highs: Tensor, qmax: int, norm: float) -> Tensor:
    """The upper end among `highs` with the least L_p error of an affine grid that begins at `low`.

    Every fourth end is tried, then the neighbours of the best of these.
    """

    def errors(ends: Tensor) -> Tensor:
        scale = ((ends - low) / qmax)[:, None]
        zero = (-low / scale).round_()
        rounded = (values / scale).round_().clamp_(-zero, qmax - zero).mul_(scale)
        return rounded.sub_(values).abs_().pow_(norm) @ counts

    best = 4 * int(errors(highs[::4]).argmin())
    near = highs[max(best - 3, 0) : best + 4]
    return near[errors(near).argmin()]
