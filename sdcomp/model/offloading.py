"""Keep weights on a small device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def weights_on(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Give a module copies of its weights on `device` for the block; then put its own weights back.

    So nothing is copied back, and weights that are mapped from a file stay mapped. At the end, submodules
    with a method `clear_cache()` drop what they computed from the copies, so that nothing stays on the
    device. A module whose weights are on `device` already is left as it is.
    """
    target = torch.empty(0, device=device).device  # "cuda" with its index
    if all(tensor.device == target for tensor in (*module.parameters(), *module.buffers())):
        yield module
        return
    stores = [store for owner in module.modules() for store in (owner._parameters, owner._buffers)]
    home = [dict(store) for store in stores]
    try:
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, nn.Parameter):
                    store[name] = nn.Parameter(tensor.detach().to(device), requires_grad=False)
                elif tensor is not None:
                    store[name] = tensor.to(device)
        yield module
    finally:
        for store, tensors in zip(stores, home, strict=True):
            store.update(tensors)
        for owner in module.modules():
            if hasattr(type(owner), "clear_cache"):
                owner.clear_cache()
