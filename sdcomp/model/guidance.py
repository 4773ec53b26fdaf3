"""Classifier-free guidance (Ho & Salimans 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BRANCHES = ("negative prompt", "prompt")
"""The two predictions of a guided step. A step without guidance has the last one only."""


def guided(branches: Sequence[Tensor] | Tensor, scale: float) -> Tensor:
    """The guided prediction from those of the `BRANCHES`; without guidance, the only one."""
    return branches[-1] if len(branches) == 1 else branches[0] + scale * (branches[1] - branches[0])
