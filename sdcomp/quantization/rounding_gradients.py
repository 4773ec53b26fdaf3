"""Quantized models that can be trained: gradients pass through the rounding, and scales are learned.

Rounding has a gradient of zero almost everywhere. The straight-through estimator (Bengio et al. 2013) takes
one instead. The gradient of a scale is then that of LSQ (Esser et al. 2020, equation 3).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.rebuild import normal_tensors
from sdcomp.quantization.attention import refuse_quantized_products
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.methods import refuse_branches
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.quantizer import Number
from sdcomp.quantization.scales import Grid, as_stored


def straight_through(x: Tensor, scale: Tensor, high: Number, low: Number) -> Tensor:
    """Compute `fake_quantize`, differentiable in `x` and `scale`; beyond the range `x` gets no gradient."""
    # clamp passes no gradient to values that it changes.
    multiples = (x * (1 / scale)).clamp(low, high)
    return (multiples + (multiples.round() - multiples).detach()) * scale


def trainable(model: QuantModel) -> QuantModel:
    """Copy a calibrated model so that its weights, biases, norms and scales can be trained.

    Weights start from their rounded values. Each scale is multiplied by 1 + a parameter that starts at 0, so
    that one learning rate fits scales of all sizes. `rounded` ends the training. Raises UserError for inputs
    that are rounded to a grid for each token, as attention's products are: these have no scales to learn.
    Low-rank branches are refused too.
    """
    if model.act_quantizer is not None and model.act_quantizer.granularity == "token":
        raise UserError("inputs with a grid for each token cannot be trained: use granularity 'tensor'")
    refuse_quantized_products(model, "training")
    refuse_branches(model, "training")
    model = copy.deepcopy(model)
    with normal_tensors():
        for layer in model.quantized_layers():
            weight = layer.weight if layer.weight_quantizer is None else layer.fake_weight()
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.register_buffer("weight_integers", None)
            for side in ("weight", "act"):
                scale = getattr(layer, f"{side}_scale")
                change = None if scale is None else nn.Parameter(torch.zeros_like(scale))
                layer.register_parameter(f"{side}_scale_change", change)
            layer.clear_cache()
    model.state.operands = _operands
    return model.requires_grad_(True)


@torch.no_grad()
def rounded(model: QuantModel) -> QuantModel:
    """End the training of a model that `trainable` made: round its weights; returns the model itself."""
    model.state.operands = None
    for layer in model.quantized_layers():
        for side in ("weight", "act"):
            change = getattr(layer, f"{side}_scale_change")
            if change is not None:
                scale = getattr(layer, f"{side}_scale").mul_(_factor(change))
                if side == "weight" and layer.weight_quantizer.granularity == "group":
                    scale.copy_(as_stored(scale).clamp(min=2**-24))  # a scale stays positive
            delattr(layer, f"{side}_scale_change")
        layer.clear_cache()
        if layer.weight_quantizer is not None:
            layer.set_rounded(layer.fake_weight())
        if layer.spec.calibrated:
            layer.set_act_scales(layer.act_scale, layer.act_clipped)
    return model.requires_grad_(False)


def _factor(change: Tensor) -> Tensor:
    # A scale stays positive.
    return (1 + change).clamp(min=0.1)


def _operands(layer: QuantLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the weight of a layer in training."""
    weight, state = layer.weight, layer.state
    if layer.weight_quantizer is not None and state.weights:
        scale = layer.weight_scale * _factor(layer.weight_scale_change)
        scales = [scale] if layer.split is None else list(scale)
        halves = []
        pairs = zip(layer.halves(weight), layer.weight_grids(), scales, strict=True)
        for half, (_, zero_point), own in pairs:
            scale, low, high = layer.weight_quantizer.broadcast_grid(half, Grid(own, zero_point))
            halves.append(straight_through(half, scale, high, low))
        weight = (halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)).to(weight.dtype)
    if layer.spec.calibrated and state.activations:
        i = state.interval
        scales = (layer.act_scale[i] * _factor(layer.act_scale_change[i])).view(-1)
        halves = [x] if layer.split is None else x.tensor_split([layer.split], dim=1)
        made = [
            straight_through(half, scale, grid.high, grid.low)
            for half, scale, grid in zip(halves, scales, layer.input_grids(), strict=True)
        ]
        x = made[0] if len(made) == 1 else torch.cat(made, dim=1)
    return x, weight
