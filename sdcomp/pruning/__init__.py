"""Pruning of any `nn.Module`: zeroed weights, N:M patterns, smaller networks, and their sizes on disk."""

from sdcomp.budgets import Curve, allocate
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.pruning.disk_sizes import disk_sizes
from sdcomp.pruning.importance import IMPORTANCES, Calibration, calibrate
from sdcomp.pruning.patterns import n_m_budgets, prune_n_m
from sdcomp.pruning.removal import remove_cheapest
from sdcomp.pruning.sparsity import ZeroCount, count_zeros, sparsity_table
from sdcomp.pruning.structured import prune_structured
from sdcomp.pruning.unstructured import prune_unstructured

__all__ = [
    "IMPORTANCES",
    "Calibration",
    "Curve",
    "ZeroCount",
    "allocate",
    "apply_channel_map",
    "calibrate",
    "channel_map",
    "count_zeros",
    "disk_sizes",
    "n_m_budgets",
    "prune_n_m",
    "prune_structured",
    "prune_unstructured",
    "remove_cheapest",
    "sparsity_table",
]
