"""Unstructured magnitude pruning: single weights set to zero. Shapes stay, and nothing gets faster."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdcomp.pruning.layers import check_amount, prunable_layers, require_rest


def prune_unstructured(
    module: nn.Module,
    amount: float,
    scope: str = "layer",
    *,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Set the share `amount` (0 to below 1) of smallest magnitude to zero.

    Pruned are the weights and biases of every convolution and linear layer below `parts` (submodule
    names; by default the UNet's blocks, or everything in a module that has none): with scope "layer" in
    each tensor by itself, as `torch.nn.utils.prune.l1_unstructured` does, with "global" over all of them
    together. Exactly round(amount * count) go; of several magnitudes that tie for the last
    place the first go, where PyTorch's choice is arbitrary. Parameters that layers share count once.

    Returns a pruned copy, or `module` itself with `inplace`. Raises ValueError for an amount out of range,
    another scope, an unknown part, a quantized module, weights that are not finite, and where nothing would
    be left.
    """
    check_amount(amount)
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', not {scope!r}")
    _together(prunable_layers(module, parts), scope, amount)  # before the copy, which may be of gigabytes
    module = module if inplace else copy.deepcopy(module)
    for tensors in _together(prunable_layers(module, parts), scope, amount):
        _zero_smallest(tensors, round(amount * sum(t.numel() for t in tensors)))
    return module


def _together(layers: list[nn.Conv2d | nn.Linear], scope: str, amount: float) -> list[list[Tensor]]:
    """The tensors whose entries compete, each tensor once, also where layers share it."""
    tensors = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
    tensors = list({id(t): t for t in tensors}.values())
    groups = [tensors] if scope == "global" else [[t] for t in tensors]
    require_rest(amount, [sum(t.numel() for t in group) for group in groups])
    return groups


@torch.no_grad()
def _zero_smallest(tensors: list[Tensor], k: int) -> None:
    """Zero exactly `k` entries of all `tensors` together."""
    if k == 0:
        return
    threshold = _kth_magnitude(tensors, k)
    ties = k - sum(int((t.abs() < threshold).sum()) for t in tensors)
    for tensor in tensors:
        magnitude = tensor.abs().contiguous()
        smallest = magnitude < threshold
        tied = (magnitude == threshold).flatten().nonzero().flatten()[:ties]
        smallest.view(-1)[tied] = True
        ties -= len(tied)
        tensor.masked_fill_(smallest, 0)


def _kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """The k-th smallest magnitude of all entries (k = 1 is the smallest)."""
    sizes = [t.numel() for t in tensors]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)  # NumPy knows no bfloat16
    values = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    for part, tensor in zip(values.split(sizes), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    values.abs_()
    if values.device.type != "cpu":
        return values.kthvalue(k).values
    # In place and vectorised: many times faster than PyTorch's selection on a CPU.
    values.numpy().partition(k - 1)
    return values[k - 1]
