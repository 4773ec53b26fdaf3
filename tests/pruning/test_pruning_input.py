"""What pruning refuses, and what it never does: all of a tensor, or a shared tensor twice."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.integer import to_int8
from sdcomp.pruning import channel_map, count_zeros, prune_structured, prune_unstructured
from sdcomp.quantization import Calibrator, QuantModel

PRUNE = {
    "layer": lambda unet, amount: prune_unstructured(unet, amount),
    "global": lambda unet, amount: prune_unstructured(unet, amount, scope="global"),
    "mask": lambda unet, amount: prune_structured(unet, amount),
    "remove": lambda unet, amount: prune_structured(unet, amount, mode="remove"),
}


@pytest.mark.parametrize("how", PRUNE)
def test_a_quantized_module_is_refused(small, how):
    quantized = QuantModel(small.unet)
    with pytest.raises(UserError, match="^this module is quantized already: prune the plain one first"):
        PRUNE[how](quantized, 0.3)
    Calibrator(small, quantized).calibrate(["a star"], steps=2)
    with pytest.raises(UserError, match="^this module is quantized already: prune the plain one first"):
        PRUNE[how](to_int8(quantized, execution="dequantized"), 0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", PRUNE)
def test_weights_that_are_not_finite_are_refused_by_name(small, how, bad):
    unet = copy.deepcopy(small.unet)
    with torch.no_grad():
        unet.middle_block[0].in_layers[2].weight[3, 0, 0, 0] = bad
    with pytest.raises(UserError, match="^the weight of middle_block.0.in_layers.2 has NaN or infinite"):
        PRUNE[how](unet, 0.3)


@pytest.mark.parametrize("how", ["layer", "global", "mask"])
def test_an_amount_that_would_leave_nothing_is_refused(small, how):
    with pytest.raises(UserError, match=r"^amount=0.999999999 rounds to all weights"):
        PRUNE[how](small.unet, 1 - 1e-9)


def test_removal_keeps_one_unit_of_each_group(small):
    unet = prune_structured(small.unet, 1 - 1e-9, mode="remove")
    assert {len(kept) for kept in channel_map(unet).values()} == {1}


def test_any_real_number_is_an_amount_and_nan_is_none():
    layer = nn.Linear(10, 10, bias=False)
    assert count_zeros(prune_unstructured(layer, np.float32(0.5))).nonzero == 50
    for bad in (float("nan"), True, "0.5", None):
        with pytest.raises(ValueError, match="amount must be a fraction"):
            prune_unstructured(layer, bad)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_that_layers_share_count_once(scope):
    torch.manual_seed(0)
    first, second, other = (nn.Linear(8, 8, bias=False) for _ in range(3))
    second.weight = first.weight
    with torch.no_grad():
        other.weight.mul_(100)  # all of the smallest are shared ones
    pruned = prune_unstructured(nn.Sequential(first, second, other), 0.25, scope=scope)
    zeros = [int((layer.weight == 0).sum()) for layer in pruned]
    assert zeros == ([16, 16, 16] if scope == "layer" else [32, 32, 0])


@pytest.mark.cuda
@pytest.mark.parametrize("how", PRUNE)
def test_on_a_gpu_the_same_goes_as_on_a_cpu(small, how):
    wanted = PRUNE[how](small.unet, 0.4)
    found = PRUNE[how](copy.deepcopy(small.unet).cuda(), 0.4)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name].cpu(), tensor), name
