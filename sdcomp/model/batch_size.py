"""How many images are computed at a time."""

from __future__ import annotations

from collections.abc import Sequence

BATCH_SIZE = 16
"""How many images `generate` computes at a time by default, if they are small."""
PIXELS = 512 * 512
"""Images that are computed at a time have at most this many pixels in all, unless a single one has more."""


def default_batch_size(pixels: Sequence[int]) -> int:
    """Return the default `batch_size` of `generate` for images of (height, width) `pixels`."""
    return rows_at_once(BATCH_SIZE, pixels)


def rows_at_once(n: int, pixels: Sequence[int]) -> int:
    """Return how many of `n` images to compute at a time, within the memory of one image of 512x512.

    The number divides `n`, so that all batches have one size: the size determines an image's last bits.
    """
    most = max(1, PIXELS // (pixels[0] * pixels[1]))
    return max(rows for rows in range(1, n + 1) if n % rows == 0 and rows <= most) if n else 1
