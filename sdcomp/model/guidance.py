"""Classifier-free guidance (Ho & Salimans 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BRANCHES = ("negative prompt", "prompt")
"""The two predictions of a guided step. A step without guidance has the last one only."""


def guided(branches: Sequence[Tensor] | Tensor, scale: float) -> Tensor:
    """The guided prediction from those of the `BRANCHES`; without guidance, the only one."""
    return branches[-1] if len(branches) == 1 else branches[0] + scale * (branches[1] - branches[0])


def guided_call(unet: Callable[[Tensor], Tensor], latents: Tensor, scale: float) -> Tensor:
    """The guided prediction for latents `(B, C, h, w)`, by one call with the rows of all `BRANCHES`.

    A `scale` of 1 needs no guidance, and calls with `B` rows; any other calls with `2 B`.
    """
    if scale == 1:
        return unet(latents)
    return guided(unet(torch.cat([latents] * len(BRANCHES))).chunk(len(BRANCHES)), scale)
