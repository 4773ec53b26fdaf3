"""Networks with fewer channels or blocks: which tensors shrink together, and which units were kept.

A module that can shrink has a method `prune_groups()`, which tells its structure. Each group is a residual
branch, or a part of one. Any or all of its units can be removed; the module's input, output and residual
connections keep their shapes. `sdcomp.pruning.units` chooses what pruning removes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PruneGroup:
    """Tensors that shrink together, in `units` units of equal size: heads, gated pairs, or norm groups.

    The group of a whole block is one unit.

    A unit owns a slice of the outputs (weights and biases) of each layer in `rows`, and the matching
    slice of the inputs of the layer `columns`. The outputs of `rows` hold all units `repeats` times, one
    after the other: twice if a layer computes all values and then all gates. `counters` are attributes
    that are proportional to the number of units, such as an attention's number of heads. All these names
    are relative to the submodule `name`, which holds the whole group.

    A block that adds its input to the group's output has a `shortcut`: the name of the submodule that the
    input passes, or "" if there is none.

    `merged`: how many of the module's own units, such as heads, are one unit here; see `merge`.
    """

    name: str
    kind: str
    units: int
    rows: tuple[str, ...]
    columns: str
    repeats: int = 1
    counters: tuple[str, ...] = ()
    shortcut: str | None = None
    merged: int = 1

    def merge(self, count: int) -> PruneGroup:
        """Return the group in units of `count` neighbouring units, or of fewer if these do not divide."""
        count = gcd(self.units, count)
        return replace(self, units=self.units // count, merged=self.merged * count)

    def slices(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, int, int]]:
        """The tensors that the units share, each as (layer, parameter name, dimension, repeats)."""
        block = module.get_submodule(self.name)
        for name in self.rows:
            layer = block.get_submodule(name)
            yield layer, "weight", 0, self.repeats
            if layer.bias is not None:
                yield layer, "bias", 0, self.repeats
        yield block.get_submodule(self.columns), "weight", 1, 1


def prune_groups(module: nn.Module) -> list[PruneGroup]:
    """Return the groups of `module`: those of its own method, or those of the UNet blocks of diffusers.

    Raises ValueError for a module without groups.
    """
    if hasattr(module, "prune_groups"):
        return module.prune_groups()
    groups = [group for name, block in module.named_modules() if (group := _diffusers_group(name, block))]
    if not groups:
        raise ValueError(
            f"nothing can be removed from {type(module).__name__}: it has no method prune_groups(), which "
            "says which tensors shrink together, and it is no UNet of diffusers"
        )
    return groups


def _diffusers_group(name: str, block: nn.Module) -> PruneGroup | None:
    # Compare class names, so that diffusers need not be installed. Other variants than SD 1.x's stay whole.
    kind = type(block).__name__
    if kind == "ResnetBlock2D" and block.time_embedding_norm == "default" and block.time_emb_proj is not None:
        rows = ("conv1", "time_emb_proj", "norm2")
        units = block.norm2.num_groups
        counters = ("norm2.num_groups",)
        return PruneGroup(name, "residual", units, rows, "conv2", counters=counters, shortcut="conv_shortcut")
    if kind == "Attention" and block.added_kv_proj_dim is None and block.norm_q is block.norm_k is None:
        counters = ("heads", "inner_dim", "inner_kv_dim")
        rows = ("to_q", "to_k", "to_v")
        return PruneGroup(name, "attention", block.heads, rows, "to_out.0", counters=counters)
    if kind == "FeedForward" and type(block.net[0]).__name__ == "GEGLU":
        units = block.net[2].in_features
        return PruneGroup(name, "feed-forward", units, ("net.0.proj",), "net.2", repeats=2)
    return None


class Bypass(nn.Module):
    """What is left of a block without units: its shortcut, if it has one, and the last layer's bias.

    `forward(x, ...)`: feature maps `(B, C, h, w)` or tokens `(B, N, C)` -> the shortcut of x plus the bias;
    without a shortcut the bias, `(C,)`, which the caller adds to x. Other arguments are ignored.
    """

    def __init__(self, bias: nn.Parameter | None, shortcut: str | None, module: nn.Module | None) -> None:
        super().__init__()
        self.bias, self.shortcut = bias, shortcut
        if module is not None:
            self.add_module(shortcut, module)

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        if self.shortcut is None:
            return x.new_zeros(()) if self.bias is None else self.bias
        if self.shortcut:
            x = getattr(self, self.shortcut)(x)
        if self.bias is None:
            return x
        return x + (self.bias[:, None, None] if x.dim() == 4 else self.bias)


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
        if any(a >= b for a, b in pairwise(kept)):
            raise ValueError(f"the units kept in {name!r} must be in increasing order, each once")
        if any(name.startswith(f"{other}.") and not units_there for other, units_there in channels.items()):
            raise ValueError(f"{name!r} is inside a block that is gone")
    for name, kept in channels.items():
        keep_units(module, groups[name], kept)
    return module
