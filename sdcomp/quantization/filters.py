"""Which layers stay in full precision."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization.layer_patterns import matches
from sdcomp.quantization.layer_sets import FILTERS


def as_filters(filters: Sequence[str] | str, module: nn.Module) -> list[str]:
    """Return filters as a list. Raises ValueError for an unknown name, TypeError for other types."""
    if isinstance(filters, str):
        if filters not in FILTERS:
            raise ValueError(
                f"quant_filters must be a list of names such as [{filters!r}], or {', '.join(FILTERS)}"
            )
        return FILTERS[filters](module)
    filters = list(filters)
    if not all(isinstance(pattern, str) for pattern in filters):
        raise TypeError("quant_filters must be a list of texts")
    return filters


def left_out(filters: list[str], layers: list[str]) -> dict[str, str]:
    """The layers that filters leave out, each with the first filter that matches it.

    Raises UserError for a filter that matches no layer, and when no layer is left.
    """
    found = {name: pattern for pattern in reversed(filters) for name in layers if matches(pattern, name)}
    for pattern in filters:
        if not any(matches(pattern, name) for name in layers):
            raise UserError(
                f"filter {pattern!r} matches no layer; names begin with"
                f" {', '.join(sorted({name.split('.')[0] for name in layers})) or 'nothing'}"
            )
    if len(found) == len(layers):
        raise UserError("nothing to quantize: the filters leave out every convolution and linear layer")
    return found
