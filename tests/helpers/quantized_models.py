"""Small modules that are calibrated by hand, for tests of simulated and integer quantization."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sdcomp.integer import int8_kernels
from sdcomp.pruning import prune_structured
from sdcomp.quantization import QuantModel, TimeStepCalibratedQuantModel

needs_kernels = pytest.mark.skipif(
    int8_kernels.missing(int8_kernels.NARROW) is not None,
    reason=str(int8_kernels.missing(int8_kernels.NARROW)),
)
WEIGHT_BITS = 8 if int8_kernels.missing() is None else 7
"""The widest weights that this machine's int8 kernels take, if it has any."""
quant_model = partial(QuantModel, weight_quant_params={"n_bits": WEIGHT_BITS})
timestep_model = partial(TimeStepCalibratedQuantModel, weight_quant_params={"n_bits": WEIGHT_BITS})


def calibrate(q: QuantModel, *calls: tuple, margin: float = 1.0) -> QuantModel:
    """Set each layer's range to the largest magnitude of its inputs over the calls, times `margin`."""
    q.set_use_quant(False, False)

    def widen(layer, args):
        x, row = args[0], q.state.interval
        parts = [x] if layer.split is None else [x[:, : layer.split], x[:, layer.split :]]
        scales = layer.act_scale.clone()
        found = torch.tensor([margin * part.abs().max().item() / q.act_quantizer.qmax for part in parts])
        scales[row] = torch.maximum(scales[row], found.view_as(scales[row]))
        layer.set_act_scales(scales, torch.zeros_like(scales))

    handles = [layer.register_forward_pre_hook(widen) for layer in q.quantized_layers()]
    for call in calls:
        q(*call)
    for handle in handles:
        handle.remove()
    q.is_calibrated.fill_(True)
    return q.set_use_quant()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return (10 * torch.log10(b.square().mean() / (a - b).square().mean())).item()


def build(unet: nn.Module, kind: str) -> QuantModel:
    if kind == "plain":
        return quant_model(unet)
    if kind == "filters":
        # Leaves out parts of blocks, so that every branch of their code runs.
        names = ["time_embed", "input_blocks.0", "out", "*.to_v", "*.proj_in", "*.conv", "*.op", "*.net.0"]
        return quant_model(unet, quant_filters=[*names, "middle_block.0.in_layers", "*.skip_connection"])
    if kind == "intervals":
        return timestep_model(unet, k=2)
    if kind == "split":
        return quant_model(unet, split_shortcuts=True)
    return quant_model(prune_structured(unet, 0.3, mode="remove"))


def small_call(sd, seed: int = 0, timestep: int = 500, batch: int = 3) -> tuple:
    return random(batch, 4, 16, 16, seed=seed), timestep, random(batch, 24, 32, seed=seed + 100)


class Layers(nn.Module):
    """A convolution with a split input, and linear layers that share an input; timesteps are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(6, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

    def shortcut_splits(self) -> dict[str, int]:
        return {"conv": 2}

    def forward(self, x: torch.Tensor, timestep: int) -> torch.Tensor:
        x = self.conv(x).movedim(1, -1)
        return self.a(x) + self.b(x)
