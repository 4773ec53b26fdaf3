"""How much of a module is zero."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import nn

from sdcomp.model.kinds import require_module


@dataclass(frozen=True)
class ZeroCount:
    """The number of parameters of a module, and of those that are not zero."""

    total: int
    nonzero: int

    @property
    def zero_fraction(self) -> float:
        """The share of parameters that are exactly zero."""
        return 1 - self.nonzero / self.total if self.total else 0.0


def count_zeros(module: nn.Module) -> ZeroCount:
    """Count all parameters of `module`, each once."""
    require_module(module)
    parameters = list(module.parameters())
    return ZeroCount(
        sum(p.numel() for p in parameters), sum(int(p.count_nonzero().item()) for p in parameters)
    )


def sparsity_table(module: nn.Module) -> pd.DataFrame:
    """`count_zeros` by block and by layer kind, in the order of the module.

    Columns: `block`, a child of the module or of one of its lists ("input_blocks.1", "middle_block");
    `kind`, the class of the layer ("Conv2d"); `parameters`, `nonzero`, `zero_fraction`. Each parameter
    counts once, so the rows add up to `count_zeros`.
    """
    require_module(module)
    lists = {name for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
    rows = []
    for name, parameter in module.named_parameters():
        path = name.split(".")[:-1]
        block = ".".join(path[: 2 if path and path[0] in lists else 1])
        kind = type(module.get_submodule(".".join(path))).__name__
        rows.append((block, kind, parameter.numel(), int(parameter.count_nonzero())))
    table = pd.DataFrame(rows, columns=["block", "kind", "parameters", "nonzero"])
    table = table.groupby(["block", "kind"], sort=False, as_index=False).sum()
    table["zero_fraction"] = 1 - table["nonzero"] / table["parameters"]
    return table
