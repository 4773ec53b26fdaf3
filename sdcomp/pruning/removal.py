"""Removal where it costs least: channels, heads and whole blocks in one ranking, against what they save."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from torch import nn

from sdcomp.budgets import Curve, allocate, lower_hull
from sdcomp.model.channel_map import keep_units
from sdcomp.model.prune_groups import PruneGroup
from sdcomp.pruning.importance import Calibration, gather, require_data
from sdcomp.pruning.layers import check_amount, prunable_layers
from sdcomp.pruning.least_squares import STEPS, Levels, correct_inputs, removal_levels
from sdcomp.pruning.units import groups_below
from sdcomp.settings import whole_number

Kept = dict[str, list[int]]
"""The units that stay in each group, by the group's name."""


def remove_cheapest(
    module: nn.Module,
    amount: float,
    calibration: Calibration | Callable[[], object],
    *,
    costs: Mapping[str, float] | None = None,
    multiple: int | None = None,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Remove the share `amount` of a module's cost, or a little more, where it adds the least output error.

    Units of all groups (channels of residual blocks, heads, gated pairs) and whole blocks compete. The error
    of a removal is the error of the group's last layer, after its other weights and its bias were corrected
    (`sdcomp.pruning.least_squares`), weighted by the layer's `Calibration.gradients`.

    `costs` gives the cost of each layer by name, for example the seconds or operations of
    `sdcomp.evaluation.layer_profile`; by default the number of its parameters. The total is the sum of all
    costs. Widths are multiples of `multiple`, by default 8 on CUDA and 1 elsewhere. Only groups below `parts`
    lose units. `calibration` is of the layers below `parts`, or a callable that runs `module`.

    Returns a smaller copy, or `module` itself with `inplace`; `channel_map` says what was kept. Raises
    ValueError for an amount out of range or that removal cannot reach, an unknown part, a module without
    groups, and missing data; UserError for a quantized module and for weights or inputs that are not finite.
    """
    check_amount(amount)
    require_data(calibration, "removal")
    prunable_layers(module, [""])  # refuses what cannot be pruned
    groups = groups_below(module, parts)
    if multiple is None:
        multiple = 8 if next(module.parameters()).is_cuda else 1
    if whole_number("multiple", multiple) < 1:
        raise ValueError(f"multiple must be at least 1, not {multiple!r}")
    calibration = gather(module, calibration, parts, gradients=True, inplace=inplace)
    if costs is None:
        costs = _parameters(module, groups)
    curves, choices = {}, {}
    for name, (curve, kept) in _families(module, groups, calibration, costs, multiple).items():
        curves[name], choices[name] = curve, kept
    levels = allocate(curves, amount * sum(costs.values()))
    module = module if inplace else copy.deepcopy(module)
    by_name = {group.name: group for group in groups}
    for family, level in levels.items():
        for name, kept in choices[family][level].items():
            remove_units(module, by_name[name], kept, calibration)
    return module


def remove_units(module: nn.Module, group: PruneGroup, kept: list[int], calibration: Calibration) -> None:
    """Shrink one group to the units `kept`, in place; its last layer makes up for the others."""
    name = f"{group.name}.{group.columns}"
    layer = module.get_submodule(name)
    correct_inputs(layer, group.units, kept, calibration.covariance(name), calibration.of(name, "means"))
    keep_units(module, group, kept)


def group_levels(
    module: nn.Module, group: PruneGroup, calibration: Calibration, *, steps: int = STEPS, fewest: int = 0
) -> tuple[Levels, list[float]]:
    """The levels of a group's removal, from all units to `fewest`, and the errors of the module's output."""
    name = f"{group.name}.{group.columns}"
    weight = module.get_submodule(name).weight.detach().flatten(1)
    gradients = calibration.of(name, "gradients")
    covariance = calibration.covariance(name)
    return removal_levels(weight, covariance, gradients, group.units, steps=steps, fewest=fewest)


def _families(
    module: nn.Module,
    groups: list[PruneGroup],
    calibration: Calibration,
    costs: Mapping[str, float],
    multiple: int,
) -> dict[str, tuple[Curve, list[Kept]]]:
    """What can be removed independently: groups, and blocks together with the groups inside them.

    Gives for each what every level saves and costs in error, and the units that stay.
    """
    found: dict[str, tuple[Curve, list[Kept]]] = {}
    # Inner groups first.
    for group in sorted(groups, key=lambda group: -group.name.count(".")):
        levels, errors = group_levels(module, group, calibration)
        saved, error, kept = [0.0], [0.0], [{}]
        for units, worse in zip(levels[1:], errors[1:], strict=True):
            more = _saved(module, group, len(units), costs)
            allowed = len(units) >= group.fewest and len(units) % _step(module, group, multiple) == 0
            if allowed and more > saved[-1]:
                saved.append(more)
                error.append(worse)
                kept.append({group.name: units})
        curve = Curve(saved, error)
        inside = {name: found.pop(name) for name in list(found) if name.startswith(f"{group.name}.")}
        if inside:
            curve, kept = _nested(curve, kept, inside)
        found[group.name] = curve, kept
    return found


def _nested(
    block: Curve, kept: list[Kept], inside: Mapping[str, tuple[Curve, list[Kept]]]
) -> tuple[Curve, list[Kept]]:
    """The levels of a block: those of the groups inside it, the cheapest first, then the block's own last."""
    steps = []
    for name, (curve, _) in inside.items():
        corners = lower_hull(curve)
        for a, b in pairwise(corners):
            saved, error = curve.saved[b] - curve.saved[a], curve.error[b] - curve.error[a]
            steps.append((error / saved, len(steps), name, b, saved, error))
    saved, error, choices, choice = [0.0], [0.0], [{}], {}
    for _, _, name, level, more, worse in sorted(steps):
        saved.append(saved[-1] + more)
        error.append(error[-1] + worse)
        choice = choice | inside[name][1][level]
        choices.append(choice)
    if block.saved[-1] > saved[-1]:
        saved.append(block.saved[-1])
        error.append(block.error[-1])
        choices.append(kept[-1])
    return Curve(saved, error), choices


def _saved(module: nn.Module, group: PruneGroup, kept: int, costs: Mapping[str, float]) -> float:
    """The cost that a group saves if it keeps `kept` units."""
    # The block's own cost is that of the products of an attention.
    names = {"", *group.rows, group.columns}
    if kept == 0:
        inside = (name for name, _ in module.get_submodule(group.name).named_modules())
        names = {name for name in inside if not group.shortcut or name.split(".")[0] != group.shortcut}
    paths = (f"{group.name}.{name}".rstrip(".") for name in names)
    return (1 - kept / group.units) * sum(costs.get(path, 0) for path in paths)


def _step(module: nn.Module, group: PruneGroup, multiple: int) -> int:
    """The number of units whose channels are a multiple of `multiple`."""
    width = module.get_submodule(f"{group.name}.{group.columns}").weight.shape[1] // group.units
    return multiple // math.gcd(multiple, width)


def _parameters(module: nn.Module, groups: list[PruneGroup]) -> dict[str, float]:
    """The number of parameters of each layer, by name; biases that removal keeps count by themselves."""
    costs = {
        name: sum(p.numel() for p in layer.parameters(recurse=False))
        for name, layer in module.named_modules()
    }
    for group in groups:
        name = f"{group.name}.{group.columns}"
        bias = module.get_submodule(name).bias
        if bias is not None:
            costs[name] -= bias.numel()
            costs[f"{name}.bias"] = bias.numel()
    return costs
