"""A module built anew around other tensors and layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Tensors made in here can be changed and trained later, also if the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def shared(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """Make a parameter around a tensor's memory. One from inference mode can have no gradients."""
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad and not tensor.is_inference())


def rebuild(
    module: nn.Module, layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Copy a module's structure with other `layers` and `tensors` in some places.

    All other parameters and buffers share their memory with the module's. A name in `layers` may be "", the
    module itself.
    """
    tensors = tensors or {}
    memo: dict[int, object] = {}
    for name, old in module.named_parameters():
        memo[id(old)] = shared(tensors.get(name, old), old.requires_grad)
    for name, old in module.named_buffers():
        memo[id(old)] = tensors.get(name, old).detach()
    for name, layer in layers.items():
        memo[id(module.get_submodule(name) if name else module)] = layer
    return copy.deepcopy(module, memo)
