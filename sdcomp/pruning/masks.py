"""Masks that keep pruned weights at zero while the others are trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune


@torch.no_grad()
def register_masks(layer: nn.Module, names: tuple[str, ...] = ("weight", "bias")) -> None:
    """Keep what is zero in `layer` at zero, by PyTorch's own masks (`weight_orig`, `weight_mask`)."""
    for name in names:
        if (tensor := getattr(layer, name)) is not None:
            prune.custom_from_mask(layer, name, tensor != 0)


def make_permanent(module: nn.Module) -> nn.Module:
    """Make all masks of `module` permanent, in place: plain parameters again, with their zeros."""
    for layer in module.modules():
        for name in ("weight", "bias"):
            if hasattr(layer, f"{name}_mask"):
                prune.remove(layer, name)
    return module
