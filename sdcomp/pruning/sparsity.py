"""How much of a module is zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ZeroCount:
    """Parameters of a module: how many there are, and how many are not zero."""

    total: int
    nonzero: int

    @property
    def zero_fraction(self) -> float:
        """The share of parameters that are exactly zero."""
        return 1 - self.nonzero / self.total if self.total else 0.0


def count_zeros(module: nn.Module) -> ZeroCount:
    """Count all parameters of `module`, each once."""
    parameters = list(module.parameters())
    return ZeroCount(
        sum(p.numel() for p in parameters), sum(int(p.count_nonzero().item()) for p in parameters)
    )
