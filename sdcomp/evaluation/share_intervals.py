"""Score intervals of shares and of paired differences of shares, for independent images and for clusters.

A score interval contains every share that the score test does not reject. It has a width also where all
images agree. Shares are arrays of any shape, so that a simulation computes many intervals at once.
"""

from __future__ import annotations

import numpy as np

from sdcomp.evaluation.confidence_intervals import Z, student

Ends = tuple[np.ndarray, np.ndarray]


def effective_number(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """How many independent images hold the information of `values` `(..., n)`.

    `members` `(n,)` numbers the scene of each image from 0 on. The number is n without clusters, else n over
    the design effect: the variance of the mean over scenes, divided by that over independent images (Kish
    1965). A factor for Student's t allows for few scenes (Korn & Graubard 1998). If all values are equal,
    nothing tells the design effect, and only the number of scenes counts.
    """
    n, order = values.shape[-1], np.argsort(members, kind="stable")
    starts = np.flatnonzero(np.diff(members[order], prepend=-1))
    scenes = len(starts)
    rest = values - values.mean(-1, keepdims=True)
    clustered = np.square(np.add.reduceat(rest[..., order], starts, axis=-1)).sum(-1) * scenes / (scenes - 1)
    single = np.square(rest).sum(-1) * n / (n - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = n * single / np.maximum(clustered, single) * (student(n - 1) / student(scenes - 1)) ** 2
    return np.where(single > 0, found, scenes)


def wilson(share: np.ndarray, n: np.ndarray) -> Ends:
    """The score interval of a share of `n` images (Wilson 1927)."""
    center = (share + Z**2 / 2 / n) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + (Z / 2 / n) ** 2)
    # The interval contains the share, also after rounding errors.
    return np.minimum(center - half, share), np.maximum(center + half, share)


def tango(gained: np.ndarray, lost: np.ndarray, n: np.ndarray) -> Ends:
    """The score interval of a paired difference of shares, gained - lost (Tango 1998, section 3).

    `gained` and `lost` are the shares of the `n` pairs where only the one, or only the other, answer is
    right. For clusters, `n` is the effective number (Yang, Sun & Hardin 2012). NaN gives NaN.
    """
    difference = np.asarray(gained - lost, dtype=float)

    def end(edge: float) -> np.ndarray:
        # The score falls from the difference to the edge; halve the range that holds the end.
        inside, outside = difference, np.full_like(difference, edge)
        for _ in range(50):
            middle = (inside + outside) / 2
            near = np.square(difference - middle) * n <= Z**2 * _variance(gained, lost, middle)
            inside, outside = np.where(near, middle, inside), np.where(near, outside, middle)
        return np.where(np.isnan(n), np.nan, inside)

    return end(-1.0), end(1.0)


def _variance(gained: np.ndarray, lost: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The variance of one pair's difference at its most likely rates, given the mean (Tango's equation 6)."""
    b = (2 - gained + lost) * difference - gained - lost
    rate = (np.sqrt(b**2 + 8 * lost * difference * (1 - difference)) - b) / 4
    return 2 * rate + difference * (1 - difference)


def difference_of_changes(mean: np.ndarray, square: np.ndarray, n: np.ndarray) -> Ends:
    """The interval of the mean of values from -2 to 2, each the difference of two paired differences.

    One value of 1 and one of -1 are added to the `n` values, and the interval is the normal one of all n + 2
    (Agresti & Min 2005 do so for paired differences of shares). `square` is the mean of the squared values.
    """
    center = n * mean / (n + 2)
    half = Z * np.sqrt(((n * square + 2) / (n + 2) - center**2) / (n + 2))
    return center - half, center + half


def few_images(n: int) -> tuple[float, float]:
    """What `n` images can show of a share, in points: half of the narrowest interval, and the smallest loss.

    The narrowest score interval is that of images which all keep their answer. A loss is shown where the
    interval is below 0; the smallest is one where no image became right. NaN: no loss can be shown.
    """
    lost = np.arange(n + 1) / n
    low, high = tango(0 * lost, lost, n)
    shown = lost[high < 0]
    return 50 * (high[0] - low[0]), 100 * (shown[0] if len(shown) else np.nan)
