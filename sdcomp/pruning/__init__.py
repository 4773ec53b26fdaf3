"""Pruning of any `nn.Module`: zeroed weights, physically smaller networks, and their sizes on disk."""

from sdcomp.model.channels import apply_channel_map, channel_map
from sdcomp.pruning.sizes import disk_sizes
from sdcomp.pruning.sparsity import ZeroCount, count_zeros, sparsity_table
from sdcomp.pruning.structured import prune_structured
from sdcomp.pruning.unstructured import prune_unstructured

__all__ = [
    "ZeroCount",
    "apply_channel_map",
    "channel_map",
    "count_zeros",
    "disk_sizes",
    "prune_structured",
    "prune_unstructured",
    "sparsity_table",
]
