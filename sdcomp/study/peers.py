"""Weights that other tools rounded, in our UNet: the same images, judged in the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError


def _quanto(unet: nn.Module, bits: int) -> dict[str, Tensor]:
    from optimum import quanto

    quanto.quantize(unet, weights=f"qint{bits}")
    quanto.freeze(unet)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, quanto.QModuleMixin)}
    return {name: layer.weight.dequantize() for name, layer in layers.items()}


def _torchao(unet: nn.Module, bits: int) -> dict[str, Tensor]:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_

    # It rounds linear layers only.
    quantize_(unet, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerAxis(0)))
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear)}
    return {name: layer.weight.dequantize() for name, layer in layers.items()}


PEERS: dict[str, tuple[Callable[[nn.Module, int], dict[str, Tensor]], tuple[int, ...]]] = {
    "quanto": (_quanto, (8, 4, 2)),
    "torchao": (_torchao, (8, 4)),
}
"""Tools that round weights alone, by name: a function that gives rounded weights, and the bits it is asked
for. quanto rounds convolutions and linear layers, in groups of up to 128 weights below 8 bits; torchao rounds
linear layers only, with one scale for each output channel."""


def peer_unet(peer: str, unet: nn.Module, bits: int) -> nn.Module:
    """Return a copy of a UNet with the weights that a peer rounds to `bits`, in floating point.

    Raises UserError where the peer is not installed, ValueError for bits that it is not asked for.
    """
    weights_of, known = PEERS[peer]
    if bits not in known:
        raise ValueError(f"{peer} is asked for {known} bits, not for {bits}")
    made = copy.deepcopy(unet)
    try:
        weights = weights_of(copy.deepcopy(unet), bits)
    except ImportError:
        raise UserError(f"{peer} is not installed: install the extra `peers`, or leave it out") from None
    with torch.no_grad():
        for name, weight in weights.items():
            made.get_submodule(name).weight.copy_(weight)
    return made
