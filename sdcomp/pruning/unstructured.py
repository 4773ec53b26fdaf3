"""Unstructured pruning: single weights set to zero. Shapes stay, and nothing gets faster."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcomp.budgets import Curve, divide
from sdcomp.pruning.importance import Calibration, check_importance, gather, weight_scores
from sdcomp.pruning.layers import check_amount, prunable_layers, require_rest
from sdcomp.pruning.resume import PruningCheckpoint
from sdcomp.pruning.second_order import prune_layer, share, sweep_errors

AMOUNTS = (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""The amounts at which `layer_amounts` measures each layer's error."""


def prune_unstructured(
    module: nn.Module,
    amount: float | Mapping[str, float],
    scope: str = "layer",
    *,
    importance: str = "magnitude",
    calibration: Calibration | Callable[[], object] | None = None,
    parts: Sequence[str] | None = None,
    inplace: bool = False,
    checkpoint: str | Path | None = None,
    inputs: str = "",
) -> nn.Module:
    """Set the share `amount` (0 to below 1) of the least important weights to zero.

    Prunes every convolution and linear layer below `parts` (submodule names; by default the UNet's blocks, or
    everything in a module that has none). With scope "layer" the entries of one tensor compete, with "global"
    those of all layers. `amount` may also map names of layers to amounts (scope "layer"); layers without an
    entry stay whole. Exactly round(amount * count) entries go. Where entries tie for the last
    place, the first ones go. Parameters that layers share count once.

    With `importance` "magnitude" weights and biases are pruned, as `torch.nn.utils.prune.l1_unstructured`
    and `global_unstructured` do. The other kinds (`sdcomp.pruning.importance`) prune weights only and need a
    `calibration`, or a callable that runs `module`, for example a generation. "second_order" also updates
    the weights that stay; its global scope takes the amounts of `layer_amounts`. Killed, it goes on from the
    file `checkpoint`, with the same result; `inputs` says what the calibration saw, so that the checkpoint of
    another one is refused.

    Returns a pruned copy, or `module` itself with `inplace`. Raises ValueError for an amount out of range,
    an unknown scope, importance, part or layer, and for missing data; UserError for a quantized module,
    weights or inputs that are not finite, a wrong checkpoint, and where nothing would be left.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', not {scope!r}")
    check_importance(importance, calibration, checkpoint)
    layers = prunable_layers(module, parts)  # before the copy, which may be of gigabytes
    amounts = _amounts(amount, scope, layers)
    _together(layers, amounts, scope, importance)
    kept = PruningCheckpoint(checkpoint, module, f"{amounts} {scope} {parts} {inputs}")
    gradients = scope == "global" or importance == "gradient"
    calibration = gather(module, calibration, parts, gradients, inplace)
    if not inplace:
        module = copy.deepcopy(module)
        layers = {name: module.get_submodule(name) for name in layers}
    done = kept.resume(layers)
    if importance == "second_order" and scope == "global":
        amounts = kept.amounts or kept.keep_amounts(layer_amounts(layers, amount, calibration))
        scope = "layer"
    for entries, k in _together(layers, amounts, scope, importance):
        name = entries[0][0]
        if importance != "second_order" and k:
            _zero(entries, layers, k, importance, calibration)
        elif k and name not in done:
            rule = share(amounts[name], calibration.gradients.get(name))
            prune_layer(layers[name], calibration.of(name, "moments"), rule)
            kept.keep(layers, name)
    kept.remove()
    return module


@torch.no_grad()
def layer_amounts(
    layers: Mapping[str, nn.Conv2d | nn.Linear], amount: float, calibration: Calibration
) -> dict[str, float]:
    """Divide a global amount of zeros among layers, with the smallest error in the module's output.

    Each layer is pruned by second order to each of `AMOUNTS`; its error is that of its outputs, weighted by
    their `Calibration.gradients`. `divide` then chooses. Together round(amount * count) weights go. Raises
    ValueError for more than the last of `AMOUNTS`.
    """
    curves = {}
    for name, layer in layers.items():
        moments, gradients = (calibration.of(name, kind) for kind in ("moments", "gradients"))
        errors = sweep_errors(layer, moments, [share(each, gradients) for each in AMOUNTS[1:]])
        # Of a small layer, several amounts are the same number of weights.
        points = {0: 0.0}
        for each, squares in zip(AMOUNTS[1:], errors, strict=True):
            points.setdefault(round(each * layer.weight.numel()), float(squares @ gradients))
        curves[name] = Curve(list(points), list(points.values()))
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    zeros = divide(curves, round(amount * sum(sizes.values())))
    return {name: zeros[name] / size for name, size in sizes.items()}


def _amounts(
    amount: float | Mapping[str, float], scope: str, layers: Mapping[str, nn.Module]
) -> dict[str, float]:
    """The amount of each layer. Raises ValueError for amounts that are out of range or of no layer."""
    if not isinstance(amount, Mapping):
        check_amount(amount)
        return dict.fromkeys(layers, amount)
    if scope == "global":
        raise ValueError("amounts of single layers go with scope 'layer'")
    for name, own in amount.items():
        if name not in layers:
            raise ValueError(f"amount names {name!r}, which is no layer that is pruned")
        check_amount(own)
    return dict.fromkeys(layers, 0.0) | dict(amount)


Entries = list[tuple[str, Tensor]]
"""Tensors with the names of their layers."""


def _together(
    layers: Mapping[str, nn.Module], amounts: Mapping[str, float], scope: str, importance: str
) -> list[tuple[Entries, int]]:
    """The tensors whose entries compete, with how many of these go; a tensor that layers share counts once.

    Raises UserError where nothing would be left.
    """
    found = {}
    for name, layer in layers.items():
        for tensor in (layer.weight, layer.bias if importance == "magnitude" else None):
            if tensor is not None:
                found.setdefault(id(tensor), (name, tensor))
    entries = list(found.values())
    groups = [entries] if scope == "global" and entries else [[entry] for entry in entries]
    sizes = [sum(t.numel() for _, t in group) for group in groups]
    counts = [round(amounts[group[0][0]] * size) for group, size in zip(groups, sizes, strict=True)]
    require_rest(max(amounts.values(), default=0), list(zip(counts, sizes, strict=True)))
    return list(zip(groups, counts, strict=True))


@torch.no_grad()
def _zero(
    entries: Entries,
    layers: Mapping[str, nn.Module],
    k: int,
    importance: str,
    calibration: Calibration | None,
) -> None:
    """Zero the k entries of least importance of all tensors together."""

    def scores(name: str, tensor: Tensor) -> Tensor:
        if importance == "magnitude":
            return tensor.abs()
        return weight_scores(name, layers[name], importance, calibration)

    for (_, tensor), mask in zip(entries, smallest(entries, scores, k), strict=True):
        tensor.masked_fill_(mask, 0)


def smallest(entries: Entries, scores: Callable[[str, Tensor], Tensor], k: int) -> Iterator[Tensor]:
    """Yield masks of exactly the `k` smallest scores of all tensors; of tied scores, the first ones.

    Scores are computed three times, rather than kept: those of a large model take gigabytes. Tensors may be
    changed as soon as their mask is there.
    """
    threshold = _kth_score(entries, scores, k)
    ties = k - sum(int((scores(*entry) < threshold).sum()) for entry in entries)
    for entry in entries:
        score = scores(*entry).contiguous()
        mask = score < threshold
        tied = (score == threshold).flatten().nonzero().flatten()[:ties]
        mask.view(-1)[tied] = True
        ties -= len(tied)
        yield mask


def _kth_score(entries: Entries, scores: Callable[[str, Tensor], Tensor], k: int) -> Tensor:
    """The k-th smallest score of all entries (k = 1 is the smallest)."""
    sizes = [t.numel() for _, t in entries]
    first = entries[0][1]
    dtype = torch.promote_types(first.dtype, torch.float32)  # NumPy knows no bfloat16
    values = torch.empty(sum(sizes), dtype=dtype, device=first.device)
    for part, (name, tensor) in zip(values.split(sizes), entries, strict=True):
        part.view(tensor.shape).copy_(scores(name, tensor))
    if values.device.type != "cpu":
        return values.kthvalue(k).values
    # In place and vectorised: many times faster than PyTorch's selection on a CPU.
    values.numpy().partition(k - 1)
    return values[k - 1]
