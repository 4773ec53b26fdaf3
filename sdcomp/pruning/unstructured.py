"""Unstructured magnitude pruning: single weights set to zero. Shapes stay, and nothing gets faster."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCKS = ("input_blocks", "middle_block", "output_blocks")
"""The parts of the UNet that published work prunes: not the time embedding, not the output layer."""


def prune_unstructured(
    module: nn.Module, amount: float, *, parts: Sequence[str] | None = None, inplace: bool = False
) -> nn.Module:
    """Set the share `amount` (0 to below 1) of smallest magnitude to zero, in each tensor by itself.

    Pruned are the weights and biases of every convolution and linear layer below `parts` (submodule
    names; by default the UNet's blocks, or everything in a module that has none). Returns a pruned copy,
    or `module` itself with `inplace`. Raises ValueError for an amount out of range or an unknown part.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise ValueError(f"amount must be a fraction from 0 to below 1, not {amount!r}")
    module = module if inplace else copy.deepcopy(module)
    for layer in prunable_layers(module, parts):
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                _zero_smallest(tensor, round(amount * tensor.numel()))
    return module


@torch.no_grad()
def _zero_smallest(tensor: Tensor, k: int) -> None:
    """Zero exactly `k` entries, also on ties; `torch.nn.utils.prune` refuses channels-last weights."""
    smallest = torch.topk(tensor.abs().contiguous().flatten(), k, largest=False).indices
    pruned = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    pruned[smallest] = True
    tensor.masked_fill_(pruned.view(tensor.shape), 0)


def prunable_layers(module: nn.Module, parts: Sequence[str] | None = None) -> list[nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers below `parts`. Raises ValueError for a part that is not there."""
    if parts is None:
        parts = [name for name in BLOCKS if hasattr(module, name)] or [""]
    layers = []
    for name in parts:
        try:
            part = module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no part {name!r}") from None
        layers += [layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return layers
