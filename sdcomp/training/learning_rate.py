"""The learning rate of every training: linear warm-up, then cosine decay to zero."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the highest learning rate at a step, from 0 to `steps` - 1 (Loshchilov & Hutter 2017)."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
