"""Structured pruning: whole output channels as masks, or units taken out so that the network is smaller."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdcomp.model.channels import PruneGroup, keep_units, prune_groups
from sdcomp.pruning.layers import check_amount, find_parts, prunable_layers, require_rest

CRITERIA = {"l1": 1, "l2": 2}


def prune_structured(
    module: nn.Module,
    amount: float,
    mode: str = "mask",
    *,
    n: float | None = None,
    criterion: str | None = None,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Take out the share `amount` (0 to below 1) of each layer's channels, or of each group's units.

    Mode "mask" is `torch.nn.utils.prune.ln_structured` on every convolution and linear layer below
    `parts` (by default the UNet's blocks): the output channels with the smallest L_`n` norm (2 by default)
    of their weights are set to zero. Biases and norms are left; shapes stay, and nothing gets faster.

    Mode "remove" takes tensors that depend on each other apart together (`PruneGroup`): hidden channels
    of residual blocks in whole groups of their norm, pairs of value and gate in feed-forward networks, and
    attention heads; our UNet's and diffusers'. A unit's score is the L1 or L2 norm (`criterion`, "l2" by
    default) of all that would go with it; in each group below `parts` the round(amount * units) units of
    smallest score go, and at least one stays. The result is smaller and faster, and `channel_map` says
    what was kept.

    Returns a pruned copy, or `module` itself with `inplace`. Raises ValueError for an amount out of
    range, an unknown mode, criterion or part, an argument of the other mode, a quantized module, and
    weights that are not finite.
    """
    check_amount(amount)
    if mode == "mask":
        if criterion is not None:
            raise ValueError("criterion belongs to mode 'remove'; the norm of a mask is n")
        # Before the copy, which may be of gigabytes.
        require_rest(amount, [len(layer.weight) for layer in prunable_layers(module, parts)])
        module = module if inplace else copy.deepcopy(module)
        for layer in prunable_layers(module, parts):
            _zero_channels(layer.weight, amount, 2 if n is None else n)
        return module
    if mode != "remove":
        raise ValueError(f"mode must be 'mask' or 'remove', not {mode!r}")
    if n is not None:
        raise ValueError("n belongs to mode 'mask'; for removal choose a criterion")
    if criterion not in (None, *CRITERIA):
        raise ValueError(f"criterion must be 'l1' or 'l2', not {criterion!r}")
    prunable_layers(module, [""])  # refuses what cannot be pruned
    groups = _groups_below(module, parts)
    module = module if inplace else copy.deepcopy(module)
    for group in groups:
        removed = min(round(amount * group.units), group.units - 1)
        scores = unit_scores(module, group, CRITERIA[criterion or "l2"])
        kept = scores.argsort(stable=True)[removed:].sort().values
        keep_units(module, group, kept.tolist())
    return module


@torch.no_grad()
def _zero_channels(weight: Tensor, amount: float, n: float) -> None:
    # The very calls of torch.nn.utils.prune, so that ties and the last bit come out the same.
    norms = torch.norm(weight.contiguous(), p=n, dim=list(range(1, weight.dim())))
    kept = len(weight) - round(amount * len(weight))
    pruned = torch.ones_like(norms, dtype=torch.bool)
    pruned[torch.topk(norms, kept).indices] = False
    weight.index_fill_(0, pruned.nonzero().flatten(), 0)


def _groups_below(module: nn.Module, parts: Sequence[str] | None) -> list[PruneGroup]:
    groups = prune_groups(module)
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


@torch.no_grad()
def unit_scores(module: nn.Module, group: PruneGroup, p: float) -> Tensor:
    """The L_p norm of all that would go with each unit of a group, `(units,)` float32 or wider."""
    norms = []
    for layer, name, dim, repeats in group.slices(module):
        tensor = getattr(layer, name)
        units = tensor.unflatten(dim, (repeats, group.units, -1)).movedim(dim + 1, 0).flatten(1)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(units, p, dim=1, dtype=dtype))
    return torch.linalg.vector_norm(torch.stack(norms), p, dim=0)
