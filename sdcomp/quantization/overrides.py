"""Other quantizers for the layers that match a filter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sdcomp.quantization.layer_sets import OVERRIDES, SIDES, Overrides


def as_table(overrides: Mapping[str, Mapping[str, object]] | str, module: nn.Module) -> Overrides:
    """Return overrides as a table. Raises ValueError for an unknown name or side."""
    if isinstance(overrides, str):
        if overrides not in OVERRIDES:
            raise ValueError(
                f"overrides must be a table, or one of {', '.join(OVERRIDES)}, not {overrides!r}"
            )
        return OVERRIDES[overrides](module)
    table = {pattern: dict(sides) for pattern, sides in overrides.items()}
    for pattern, sides in table.items():
        if not sides.keys() <= set(SIDES):
            raise ValueError(f"override {pattern!r} may have {' and '.join(SIDES)} only, not {list(sides)}")
    return table
