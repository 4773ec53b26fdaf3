"""Networks with fewer channels or blocks: keep some units of a group, and remember which ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sdcomp.model.bypass import Bypass
from sdcomp.model.prune_groups import PruneGroup, prune_groups

_SIZES = {0: ("out_channels", "out_features", "num_channels"), 1: ("in_channels", "in_features")}


@torch.no_grad()
def keep_units(module: nn.Module, group: PruneGroup, kept: list[int]) -> None:
    """Shrink one group of `module` in place to the units `kept` (increasing indices).

    Without any unit a block becomes its `Bypass`.
    """
    if len(kept) == group.units:
        return
    record = module.__dict__.setdefault("_kept_units", {})
    if not kept:
        _bypass(module, group)
        for name in [name for name in record if name.startswith(f"{group.name}.")]:
            del record[name]
        record[group.name] = []
        return
    for layer, name, dim, repeats in group.slices(module):
        old = getattr(layer, name)
        new = _select(old, dim, repeats, group.units, kept)
        setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
        for size in _SIZES[dim]:
            if hasattr(layer, size):
                setattr(layer, size, new.shape[dim])
    for counter in group.counters:
        owner, _, name = f"{group.name}.{counter}".rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, name, getattr(owner, name) * len(kept) // group.units)
    # The record counts the module's own units, so saved files do not depend on how pruning merges them.
    before = record.get(group.name, range(group.units * group.merged))
    record[group.name] = [before[i * group.merged + j] for i in kept for j in range(group.merged)]


def _bypass(module: nn.Module, group: PruneGroup) -> None:
    block = module.get_submodule(group.name)
    # diffusers' blocks have None where the input stays as it is.
    inside = getattr(block, group.shortcut) if group.shortcut else None
    shortcut = "" if group.shortcut and inside is None else group.shortcut
    last = block.get_submodule(group.columns)
    module.set_submodule(group.name, Bypass(last.bias, shortcut, inside).train(block.training))


def _select(tensor: Tensor, dim: int, repeats: int, units: int, kept: list[int]) -> Tensor:
    index = torch.tensor(kept, device=tensor.device)
    selected = tensor.unflatten(dim, (repeats, units, -1)).index_select(dim + 1, index)
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    return selected.flatten(dim, dim + 2).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def channel_map(module: nn.Module) -> dict[str, list[int]]:
    """Return the original indices of the units that were kept, for each group that lost some.

    The map is empty for a whole module; a removed block has an empty list. It consists of plain containers,
    ready for JSON.
    """
    return {name: list(kept) for name, kept in module.__dict__.get("_kept_units", {}).items()}


def apply_channel_map(module: nn.Module, channels: dict[str, list[int]]) -> nn.Module:
    """Shrink a whole `module` in place to the units that `channels` lists, and return it.

    Then the state dict of the module that `channels` came from loads strictly. On the meta device this
    takes no memory. Raises ValueError, before any change, if the map does not fit this architecture.
    """
    if channel_map(module):
        raise ValueError("a channel map applies to a whole module, and this one has lost channels already")
    if not isinstance(channels, dict):
        raise ValueError(f"a channel map is a table of groups, not {type(channels).__name__}")
    groups = {group.name: group for group in prune_groups(module)} if channels else {}
    for name, kept in channels.items():
        if name not in groups:
            raise ValueError(f"{type(module).__name__} has no group {name!r} that could shrink")
        units = groups[name].units
        if not (isinstance(kept, list) and all(type(i) is int and 0 <= i < units for i in kept)):
            raise ValueError(f"the units kept in {name!r} must be a list of numbers from 0 to {units - 1}")
        if len(kept) < groups[name].fewest:
            raise ValueError(f"{name!r} must keep a unit, since the block does more than to add to its input")
        if any(a >= b for a, b in pairwise(kept)):
            raise ValueError(f"the units kept in {name!r} must be in increasing order, each once")
        if any(name.startswith(f"{other}.") and not units_there for other, units_there in channels.items()):
            raise ValueError(f"{name!r} is inside a block that is gone")
    for name, kept in channels.items():
        keep_units(module, groups[name], kept)
    return module
