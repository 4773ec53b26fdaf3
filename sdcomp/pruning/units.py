"""The units that structured pruning removes: attention heads, groups of channels, gated pairs, blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sdcomp.model.prune_groups import PruneGroup, prune_groups
from sdcomp.pruning.layers import find_parts

HEADS_PER_UNIT = 1
"""Neighbouring heads of an attention that are removed together."""
NORM_GROUPS_PER_UNIT = 1
"""Neighbouring norm groups of a residual block whose hidden channels are removed together."""
PAIRS_PER_UNIT = 1
"""Neighbouring pairs of value and gate of a feed-forward network that are removed together."""


def groups_below(module: nn.Module, parts: Sequence[str] | None) -> list[PruneGroup]:
    """The groups of a module below `parts` (default: all), in the units that pruning removes.

    If a group cannot be cut into units of that size, the units are smaller: 3 heads are removed one by one,
    also where heads go in pairs. Raises ValueError for a part without any group.
    """
    groups = [_in_units(group) for group in prune_groups(module)]
    if parts is None:
        return groups
    find_parts(module, parts)
    below = {
        part: [g for g in groups if f"{g.name}.".startswith(f"{part}." if part else "")] for part in parts
    }
    for part, found in below.items():
        if not found:
            raise ValueError(f"below {part!r} there is nothing that can be removed")
    wanted = {group.name for found in below.values() for group in found}
    return [group for group in groups if group.name in wanted]


def _in_units(group: PruneGroup) -> PruneGroup:
    """Merge the units that are removed together."""
    together = {
        "attention": HEADS_PER_UNIT,
        "residual": NORM_GROUPS_PER_UNIT,
        "feed-forward": PAIRS_PER_UNIT,
    }
    return group.merge(together.get(group.kind, 1))
