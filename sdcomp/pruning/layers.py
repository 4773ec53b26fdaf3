"""What is pruned: the layers below some parts of a module, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

BLOCKS = ("input_blocks", "middle_block", "output_blocks")
"""The parts of the UNet that published work prunes: not the time embedding, not the output layer."""


def check_amount(amount: object) -> None:
    """Raise ValueError for an amount that is no share from 0 to below 1."""
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise ValueError(f"amount must be a fraction from 0 to below 1, not {amount!r}")


def prunable_layers(module: nn.Module, parts: Sequence[str] | None = None) -> list[nn.Conv2d | nn.Linear]:
    """The convolutions and linear layers below `parts`, each once, in the order of the parts.

    By default the parts are the UNet's blocks, or all of a module that has none. Raises ValueError for a
    part that is not there, and where masks are kept, which hide the weights.
    """
    if parts is None:
        parts = [name for name in BLOCKS if hasattr(module, name)] or [""]
    layers = {}
    for name, part in zip(parts, find_parts(module, parts), strict=True):
        for path, layer in part.named_modules(prefix=name):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                if hasattr(layer, "weight_mask") or hasattr(layer, "bias_mask"):
                    raise ValueError(f"{path} keeps the masks of an earlier pruning: make_permanent() first")
                layers[layer] = None
    return list(layers)


def find_parts(module: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """The submodules of these names. Raises ValueError for one that is not there."""
    if isinstance(parts, str):
        raise ValueError(f"parts must be a list of names: [{parts!r}]")
    found = []
    for name in parts:
        try:
            found.append(module.get_submodule(name))
        except AttributeError:
            raise ValueError(f"{type(module).__name__} has no part {name!r}") from None
    return found
