"""N:M sparsity: at most n of every m consecutive inputs of a weight matrix are not zero.

NVIDIA's tensor cores since Ampere multiply 2:4 matrices at up to twice the speed (Mishra et al. 2021). As in
NVIDIA's ASP, the inputs of a convolution are its channels, at each position of the kernel by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcomp.budgets import Curve, allocate
from sdcomp.errors import UserError
from sdcomp.moments import weight_matrix
from sdcomp.pruning.importance import (
    Calibration,
    check_importance,
    gather,
    require_data,
    weight_scores,
)
from sdcomp.pruning.layers import prunable_layers
from sdcomp.pruning.resume import PruningCheckpoint
from sdcomp.pruning.second_order import pattern, prune_layer, sweep_errors


def prune_n_m(
    module: nn.Module,
    n: int | Mapping[str, int] = 2,
    m: int = 4,
    *,
    importance: str = "magnitude",
    calibration: Calibration | Callable[[], object] | None = None,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    inputs: str = "",
) -> nn.Module:
    """Keep the `n` most important weights of every `m` consecutive inputs; the others become zero.

    Prunes the weights of the convolutions and linear layers below `parts` (default: the UNet's blocks) that
    tensor cores take: `takes_pattern`. Other layers and biases stay whole. `n` (1 to m) may be a mapping from
    names of layers, for example of `n_m_budgets`; layers without an entry stay whole. Of tied weights the
    first become zero. For the other arguments see `prune_unstructured`.

    Returns a pruned copy, or `module` itself with `inplace`. Raises ValueError for n or m out of range, an
    unknown importance, part or layer, and for missing data; UserError for a quantized module, for weights or
    inputs that are not finite, a wrong checkpoint, and where no layer takes the pattern.
    """
    check_importance(importance, calibration, checkpoint)
    layers = _layers(module, m, parts)
    if isinstance(n, Mapping):
        if unknown := sorted(set(n) - set(layers)):
            raise ValueError(f"n names {unknown[0]!r}, which is no layer that takes the pattern")
        counts = dict(n)
    else:
        counts = dict.fromkeys(layers, n)
    for count in counts.values():
        _check_count(count, m)
    kept = PruningCheckpoint(checkpoint, module, f"{counts} of {m} {parts} {inputs}")
    calibration = gather(module, calibration, parts, importance == "gradient", inplace)
    module = module if inplace else copy.deepcopy(module)
    layers = {name: module.get_submodule(name) for name in layers}
    done = kept.resume(layers)
    for name, count in counts.items():
        if count < m and name not in done:
            _prune(name, layers[name], count, m, importance, calibration)
            kept.keep(layers, name)
    kept.remove()
    return module


def n_m_budgets(
    module: nn.Module,
    kept: float,
    m: int = 4,
    *,
    choices: Iterable[int] = (1, 2, 4),
    calibration: Calibration | Callable[[], object],
    parts: Sequence[str] | None = None,
) -> dict[str, int]:
    """Choose n for each layer: at most the share `kept` of all weights stays, with the smallest output error.

    Each layer is pruned by second order to each of the `choices` (m, a whole layer, is always one); its error
    is that of its outputs times their `Calibration.gradients`. `allocate` then divides the budget. With
    choices (2, 4) it says which layers should stay whole, and kept is from 0.5 to 1.

    Returns a mapping for `prune_n_m`. Raises what `prune_n_m` does, and ValueError for a share that the
    choices cannot reach.
    """
    require_data(calibration, "the choice of n")
    if isinstance(kept, bool) or not isinstance(kept, Real) or not 0 < kept <= 1:
        raise ValueError(f"kept must be a fraction above 0, and at most 1, not {kept!r}")
    counts = sorted({m, *choices}, reverse=True)
    for count in counts:
        _check_count(count, m)
    layers = _layers(module, m, parts)
    calibration = gather(module, calibration, parts, gradients=True)
    curves = {}
    for name, layer in layers.items():
        moments, gradients = (calibration.of(name, kind) for kind in ("moments", "gradients"))
        rules = [pattern(count, m) for count in counts[1:]]
        errors = sweep_errors(layer, moments, rules, order=channels_last_columns(layer))
        saved = [layer.weight.numel() * (1 - count / m) for count in counts]
        curves[name] = Curve(saved, [0.0, *(float(squares @ gradients) for squares in errors)])
    total = sum(layer.weight.numel() for layer in layers.values())
    levels = allocate(curves, (1 - kept) * total)
    return {name: counts[level] for name, level in levels.items()}


def takes_pattern(layer: nn.Module, m: int = 4) -> bool:
    """Whether a layer is a matrix that sparse tensor cores take, by ASP's rule for half precision.

    The rule is: inputs in multiples of 16, outputs in multiples of 8, one group of channels. Inputs must also
    be a multiple of `m`.
    """
    rows, inputs = layer.weight.shape[:2]
    return inputs % 16 == 0 and inputs % m == 0 and rows % 8 == 0 and getattr(layer, "groups", 1) == 1


def _layers(module: nn.Module, m: int, parts: Sequence[str] | None) -> dict[str, nn.Conv2d | nn.Linear]:
    if type(m) is not int or m < 2:
        raise ValueError(f"m must be a whole number from 2, not {m!r}")
    layers = {
        name: layer for name, layer in prunable_layers(module, parts).items() if takes_pattern(layer, m)
    }
    if not layers:
        raise UserError(
            "no layer takes the pattern: inputs must be a multiple of 16 and of m, outputs a multiple of 8"
        )
    return layers


def _check_count(n: object, m: int) -> None:
    if type(n) is not int or not 1 <= n <= m:
        raise ValueError(f"n must be a whole number from 1 to m, {m}, not {n!r}")


@torch.no_grad()
def _prune(
    name: str, layer: nn.Module, n: int, m: int, importance: str, calibration: Calibration | None
) -> None:
    """Prune one layer in place."""
    if importance == "second_order":
        order = channels_last_columns(layer)
        prune_layer(layer, calibration.of(name, "moments"), pattern(n, m), order=order)
        return
    groups = weight_scores(name, layer, importance, calibration).movedim(1, -1).unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    layer.weight.masked_fill_(mask.flatten(-2).movedim(-1, 1), 0)


def channels_last_columns(layer: nn.Module) -> Tensor:
    """The columns of a layer's weight matrix, ordered by kernel position first and channel last."""
    columns = torch.arange(weight_matrix(layer).shape[1], device=layer.weight.device)
    return columns.view(layer.weight.shape[1], -1).T.flatten()
