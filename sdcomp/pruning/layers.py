"""The layers that pruning changes, and checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.model.kinds import require_module
from sdcomp.model.layers import is_quantized

BLOCKS = (
    "input_blocks", "middle_block", "output_blocks",
    "down_blocks", "mid_block", "up_blocks",
    "transformer_blocks",
)  # fmt: skip
"""The parts that published work prunes: all but embeddings, first convolution and output layer.

They are named as in our UNet, in diffusers' UNets, and in its transformers.
"""


def check_amount(amount: object) -> None:
    """Raise ValueError for an amount that is not a fraction from 0 to below 1."""
    if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 <= amount < 1:
        raise ValueError(f"amount must be a fraction from 0 to below 1, not {amount!r}")


def require_rest(amount: object, counts: Sequence[tuple[int, int]]) -> None:
    """Raise UserError where pruning leaves nothing: `counts` are pairs (how many go, of how many)."""
    if counts and all(removed == count for removed, count in counts):
        raise UserError(f"amount={amount!r} rounds to all weights: give a smaller one")


def prunable_layers(
    module: nn.Module, parts: Sequence[str] | None = None
) -> dict[str, nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers below `parts` by name, each once, in the order of the parts.

    By default the parts are the UNet's blocks, or all of a module that has none. Raises ValueError for an
    unknown part, UserError for a quantized module, for one with LoRA layers and for weights that are not
    finite, and TypeError for what is no module, such as a whole model.
    """
    require_module(module)
    if is_quantized(module):
        raise UserError("this module is quantized already: prune the plain one first, then quantize that")
    if any(hasattr(layer, "base_layer") for layer in module.modules()):
        raise UserError("this module has LoRA layers beside its own: fuse and unload them first")
    if parts is None:
        parts = [name for name in BLOCKS if hasattr(module, name)] or [""]
    layers = {}
    for name, part in zip(parts, find_parts(module, parts), strict=True):
        for path, layer in part.named_modules(prefix=name):
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer not in layers:
                require_finite(path, layer)
                layers[layer] = path
    return {path: layer for layer, path in layers.items()}


@torch.no_grad()
def require_finite(name: str, layer: nn.Module) -> None:
    """Raise UserError for a layer with NaN or infinite weights, which cannot be ranked."""
    for kind, parameter in layer.named_parameters(recurse=False):
        if not parameter.is_meta and not parameter.isfinite().all():
            raise UserError(f"the {kind} of {name} has NaN or infinite values: check where it comes from")


def find_parts(module: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Return the submodules of these names. Raises ValueError for a name that does not exist."""
    if isinstance(parts, str):
        raise ValueError(f"parts must be a list of names: [{parts!r}]")
    found = []
    for name in parts:
        try:
            found.append(module.get_submodule(name))
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no part {name!r}") from None
    return found
