"""Pruning of any `nn.Module`, and the accounting of zeros."""

from sdcomp.pruning.sparsity import ZeroCount, count_zeros
from sdcomp.pruning.unstructured import prune_unstructured

__all__ = ["ZeroCount", "count_zeros", "prune_unstructured"]
