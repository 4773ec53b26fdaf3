"""Structured pruning: output channels set to zero, or units removed so that the network is smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sdcomp.model.channel_map import keep_units
from sdcomp.model.prune_groups import PruneGroup
from sdcomp.pruning.importance import Calibration, check_importance, gather, weight_scores
from sdcomp.pruning.layers import check_amount, prunable_layers, require_rest
from sdcomp.pruning.removal import group_levels, remove_units
from sdcomp.pruning.units import groups_below

CRITERIA = {"l1": 1, "l2": 2}


def prune_structured(
    module: nn.Module,
    amount: float,
    mode: str = "mask",
    *,
    n: float | None = None,
    criterion: str | None = None,
    importance: str = "magnitude",
    calibration: Calibration | Callable[[], object] | None = None,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Remove the share `amount` (0 to below 1) of each layer's channels, or of each group's units.

    Mode "mask" is `torch.nn.utils.prune.ln_structured` on every convolution and linear layer below
    `parts` (by default the UNet's blocks): the output channels with the smallest L_`n` norm (2 by default)
    of their weights are set to zero. Biases and norms are left; shapes stay, and nothing gets faster.

    Mode "remove" shrinks tensors that depend on each other together (`sdcomp.pruning.units`): hidden channels
    of residual blocks in whole groups of their norm, pairs of value and gate in feed-forward networks, and
    attention heads; in our UNet and in diffusers'. In each group below `parts` the round(amount * units)
    units of least importance go, and at least one stays. The result is smaller and faster, and `channel_map`
    says what was kept. To remove units where it costs least, see `remove_cheapest`.

    The `importance` of a unit is the L1 or L2 norm (`criterion`, "l2" by default) of all its weights.
    The other kinds need a `calibration`, or a callable that runs `module`. For "wanda" and "gradient" a unit
    counts as the sum over its inputs to the group's last layer. "second_order" removes one unit after the
    other and corrects the weights that stay (`sdcomp.pruning.least_squares`).

    Returns a pruned copy, or `module` itself with `inplace`. Raises ValueError for an amount out of
    range, an unknown mode, criterion, importance or part, an argument of the other mode, and missing data;
    UserError for a quantized module and for weights or inputs that are not finite.
    """
    check_amount(amount)
    check_importance(importance, calibration)
    if mode not in ("mask", "remove"):
        raise ValueError(f"mode must be 'mask' or 'remove', not {mode!r}")
    if mode == "remove" and n is not None:
        raise ValueError("n belongs to mode 'mask'; for removal choose a criterion")
    if mode == "mask" and criterion is not None:
        raise ValueError("criterion belongs to mode 'remove'; the norm of a mask is n")
    if mode == "mask" and importance != "magnitude":
        raise ValueError(f"importance {importance!r} belongs to mode 'remove'")
    if criterion not in (None, *CRITERIA):
        raise ValueError(f"criterion must be 'l1' or 'l2', not {criterion!r}")
    # Refuse what cannot be pruned before the copy, which may be of gigabytes.
    layers = prunable_layers(module, parts if mode == "mask" else [""])
    if mode == "mask":
        rows = [len(layer.weight) for layer in layers.values()]
        require_rest(amount, [(round(amount * count), count) for count in rows])
        module = module if inplace else copy.deepcopy(module)
        for name in layers:
            _zero_channels(module.get_submodule(name).weight, amount, 2 if n is None else n)
        return module
    groups = groups_below(module, parts)
    calibration = gather(module, calibration, parts, importance not in ("magnitude", "wanda"), inplace)
    module = module if inplace else copy.deepcopy(module)
    for group in groups:
        _remove_share(module, group, amount, importance, CRITERIA[criterion or "l2"], calibration)
    return module


def _remove_share(
    module: nn.Module,
    group: PruneGroup,
    amount: float,
    importance: str,
    p: float,
    calibration: Calibration | None,
) -> None:
    """Remove round(amount * units) units of a group, in place, but not the last one."""
    removed = min(round(amount * group.units), group.units - 1)
    if not removed:
        return
    if importance == "second_order":
        left = group.units - removed
        levels, _ = group_levels(module, group, calibration, steps=group.units, fewest=left)
        remove_units(module, group, levels[-1], calibration)
        return
    if importance == "magnitude":
        scores = unit_scores(module, group, p)
    else:
        scores = input_scores(module, group, importance, calibration)
    keep_units(module, group, scores.argsort(stable=True)[removed:].sort().values.tolist())


@torch.no_grad()
def _zero_channels(weight: Tensor, amount: float, n: float) -> None:
    # The very calls of torch.nn.utils.prune, so that ties and the last bit come out the same.
    norms = torch.norm(weight.contiguous(), p=n, dim=list(range(1, weight.dim())))
    kept = len(weight) - round(amount * len(weight))
    pruned = torch.ones_like(norms, dtype=torch.bool)
    pruned[torch.topk(norms, kept).indices] = False
    weight.index_fill_(0, pruned.nonzero().flatten(), 0)


@torch.no_grad()
def unit_scores(module: nn.Module, group: PruneGroup, p: float) -> Tensor:
    """The L_p norm of all that goes with each unit of a group, `(units,)` float32 or wider."""
    norms = []
    for layer, name, dim, repeats in group.slices(module):
        tensor = getattr(layer, name)
        units = tensor.unflatten(dim, (repeats, group.units, -1)).movedim(dim + 1, 0).flatten(1)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(units, p, dim=1, dtype=dtype))
    return torch.linalg.vector_norm(torch.stack(norms), p, dim=0)


def input_scores(module: nn.Module, group: PruneGroup, importance: str, calibration: Calibration) -> Tensor:
    """The sum of `weight_scores` over each unit's inputs to the group's last layer, `(units,)`."""
    name = f"{group.name}.{group.columns}"
    scores = weight_scores(name, module.get_submodule(name), importance, calibration)
    return scores.sum(0).view(group.units, -1).sum(1)
