"""Which tensors of a network shrink together.

A module that can shrink has a method `prune_groups()`, which tells its structure. Each group is a residual
branch, or a part of one. Any or all of its units can be removed; the module's input, output and residual
connections keep their shapes. `sdcomp.pruning.units` chooses what pruning removes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from torch import nn


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

    `fewest`: how many units must stay; 0 where a `Bypass` can take the block's place.

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
    fewest: int = 0
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
        # A bypass scales and resamples nothing.
        whole = block.output_scale_factor != 1 or block.upsample or block.downsample
        return PruneGroup(
            name, "residual", units, rows, "conv2", counters=("norm2.num_groups",), shortcut="conv_shortcut",
            fewest=1 if whole else 0,
        )  # fmt: skip
    if kind == "Attention" and _is_plain(block):
        counters = ("heads", "inner_dim", "inner_kv_dim")
        rows = ("to_q", "to_k", "to_v")
        shortcut = "" if block.residual_connection else None
        fewest = 0 if block.rescale_output_factor == 1 else 1
        return PruneGroup(
            name, "attention", block.heads, rows, "to_out.0", counters=counters, shortcut=shortcut,
            fewest=fewest,
        )  # fmt: skip
    if kind == "FeedForward" and type(block.net[0]).__name__ == "GEGLU":
        units = block.net[2].in_features
        return PruneGroup(name, "feed-forward", units, ("net.0.proj",), "net.2", repeats=2)
    return None


def _is_plain(attention: nn.Module) -> bool:
    """Whether the heads of an attention of diffusers own rows of three projections, and nothing else.

    So it has no projections of other conditions or of an IP-Adapter, no norms of queries and keys, as many
    heads of keys as of queries, and its projections are not fused.
    """
    return (
        attention.added_kv_proj_dim is None
        and attention.norm_q is attention.norm_k is None
        and attention.inner_kv_dim == attention.inner_dim
        # Unfusing leaves the attribute `fused_projections` as it is.
        and "Fused" not in type(attention.processor).__name__
        and not (isinstance(attention.processor, nn.Module) and [*attention.processor.parameters()])
    )
