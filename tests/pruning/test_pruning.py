"""Pruning against PyTorch's own, and the counts that were published for Stable Diffusion 1.5."""

import copy

import numpy as np
import pytest
import torch
from conftest import without_zeros
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sdcomp.model import SD15
from sdcomp.model.unet import UNet
from sdcomp.pruning import ZeroCount, count_zeros, prune_unstructured

BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def in_blocks(name: str) -> bool:
    return name.startswith(BLOCKS)


@pytest.mark.parametrize("amount", [0, 0.05, 0.5, 0.99])
def test_pruning_is_exactly_pytorchs_l1_unstructured(tiny, amount):
    # PyTorch's takes no channels-last weights, and leaves negative zeros, which are equal to ours.
    expected = copy.deepcopy(tiny.unet).to(memory_format=torch.contiguous_format)
    for name, layer in layers(expected).items():
        if in_blocks(name):
            for kind in ("weight", "bias"):
                if getattr(layer, kind) is not None:
                    # As an integer 0 would be a number of weights, here it is a share.
                    prune.l1_unstructured(layer, kind, float(amount))
                    prune.remove(layer, kind)
    before = copy.deepcopy(tiny.unet.state_dict())
    pruned = prune_unstructured(tiny.unet, amount)
    assert type(pruned) is UNet and pruned is not tiny.unet
    state, wanted, after = pruned.state_dict(), expected.state_dict(), tiny.unet.state_dict()
    assert state.keys() == wanted.keys() == before.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name]), name
        assert torch.equal(after[name], before[name]), name
        if not in_blocks(name):
            assert torch.equal(tensor, before[name]), name

    # Every tensor of the blocks' layers, biases too, lost its share.
    for name, layer in layers(pruned).items():
        if in_blocks(name):
            for tensor in layer.parameters():
                assert int((tensor == 0).sum()) == round(amount * tensor.numel())
                assert tensor.requires_grad


def test_the_memory_format_does_not_matter(small):
    pruned = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        unet = prune_unstructured(copy.deepcopy(small.unet).to(memory_format=memory_format), 0.4)
        assert unet.input_blocks[0][0].weight.is_contiguous(memory_format=memory_format)
        pruned.append(unet.state_dict())
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[0])


@settings(max_examples=60, deadline=None)
@given(
    amount=st.floats(0, 0.999),
    values=st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=60),
)
def test_the_smallest_magnitudes_go_and_no_other(amount, values):
    assume(round(amount * len(values)) < len(values))
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    before = np.array(layer.weight.tolist()[0])
    after = np.array(prune_unstructured(layer, amount).weight.tolist()[0])
    gone = (after == 0) & (before != 0)
    # Zeros that were there count as pruned first.
    assert gone.sum() == max(0, round(amount * len(values)) - (before == 0).sum())
    assert (after[~gone] == before[~gone]).all()
    if gone.any():
        assert abs(before[gone]).max() <= abs(after[after != 0]).min(initial=np.inf)


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.73])
def test_ties_in_half_precision_are_not_pruned_beyond_the_amount(amount):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3).half()
    with torch.no_grad():
        for tensor in layer.parameters():
            # Four magnitudes only; a threshold would take a quarter of the weights at a time.
            tensor.copy_(
                (torch.randint(1, 5, tensor.shape) * 0.25) * (2 * torch.randint(2, tensor.shape) - 1)
            )
    pruned = prune_unstructured(layer, amount)
    for tensor in pruned.parameters():
        assert tensor.dtype == torch.float16
        assert int((tensor == 0).sum()) == round(amount * tensor.numel())


@pytest.mark.parametrize("amount", [0, 0.05, 0.5, 0.95])
def test_global_scope_is_exactly_pytorchs_global_unstructured(small, amount):
    # PyTorch's own takes no weights with the channels last.
    expected = copy.deepcopy(small.unet).to(memory_format=torch.contiguous_format)
    tensors = [
        (layer, kind)
        for name, layer in layers(expected).items()
        for kind in ("weight", "bias")
        if in_blocks(name) and getattr(layer, kind) is not None
    ]
    prune.global_unstructured(tensors, prune.L1Unstructured, amount=float(amount))
    for layer, kind in tensors:
        prune.remove(layer, kind)
    pruned = prune_unstructured(small.unet, amount, scope="global")
    state, wanted = pruned.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    shares = {round(float((t == 0).float().mean()), 2) for t in state.values() if t.dim() > 1}
    assert len(shares) > 3 or amount == 0  # and not the same share of each


@settings(max_examples=40, deadline=None)
@given(
    amount=st.floats(0, 0.999),
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=40),
)
def test_global_ties_go_in_order_and_no_more_than_the_amount(amount, values):
    assume(round(amount * len(values)) < len(values))
    cut = len(values) // 2
    module = nn.Sequential(nn.Linear(cut, 1, bias=False), nn.Linear(len(values) - cut, 1, bias=False))
    with torch.no_grad():
        for layer, part in zip(module, (values[:cut], values[cut:]), strict=True):
            layer.weight.copy_(torch.tensor([part]))
    pruned = prune_unstructured(module, amount, scope="global")
    after = [x for layer in pruned for x in layer.weight[0].tolist()]
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))  # stable, as ties should be
    gone = set(order[: round(amount * len(values))])
    assert after == [0.0 if i in gone else x for i, x in enumerate(values)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_other_types_of_weights(dtype, scope):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(50, 7)).to(dtype)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    pruned = prune_unstructured(module, 0.35, scope=scope).state_dict()
    counts = [round(0.35 * t.numel()) for t in before.values()]
    gone = [int((t == 0).sum()) for t in pruned.values()]
    total = sum(t.numel() for t in before.values())
    assert gone == counts if scope == "layer" else sum(gone) == round(0.35 * total)
    for name, tensor in pruned.items():
        assert tensor.dtype == dtype and torch.equal(tensor[tensor != 0], before[name][tensor != 0])
        if scope == "layer":
            assert before[name][tensor == 0].abs().max() <= tensor[tensor != 0].abs().min()


def test_an_unknown_scope_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global', not 'all'"):
        prune_unstructured(layer, 0.5, scope="all")


def test_in_place_prunes_the_module_itself(small):
    unet = copy.deepcopy(small.unet)
    parameters = dict(unet.named_parameters())
    result = prune_unstructured(unet, 0.3, inplace=True)
    assert result is unet
    expected = prune_unstructured(small.unet, 0.3).state_dict()
    for name, parameter in unet.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, expected[name])
    # Pruned again, nothing more goes.
    prune_unstructured(unet, 0.3, inplace=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_parts_say_what_is_pruned(small):
    before = small.unet.state_dict()
    after = prune_unstructured(small.unet, 0.5, parts=["out", "middle_block.1"]).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        f"{name}.{kind}"
        for name, layer in layers(small.unet).items()
        if name.startswith(("out.", "middle_block.1."))
        for kind in ("weight", "bias")
        if getattr(layer, kind) is not None
    }
    assert changed == expected and "out.2.weight" in changed


def test_any_module_can_be_pruned():
    module = nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.Conv2d(2, 5, 1))
    pruned = prune_unstructured(module, 0.5)
    zeros = [int((p == 0).sum()) for p in pruned[0].parameters()] + [
        int((p == 0).sum()) for p in pruned[2].parameters()
    ]
    assert zeros == [50, 5, 5, 2]
    assert torch.equal(pruned[1].weight, torch.ones(10))
    # LayerNorm's own zeros are counted, and not its doing.
    assert count_zeros(pruned) == ZeroCount(total=145, nonzero=145 - 50 - 5 - 5 - 2 - 10)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_where_there_are_no_layers_nothing_changes(small, scope):
    module = nn.Sequential(nn.LayerNorm(4))
    assert torch.equal(prune_unstructured(module, 0.5, scope)[0].weight, torch.ones(4))
    same = prune_unstructured(small.unet, 0.5, scope, parts=["out.1"])
    assert all(torch.equal(t, same.state_dict()[name]) for name, t in small.unet.state_dict().items())


@pytest.mark.parametrize("amount", [-0.1, 1, 1.0, 1.3, 30, True, False, "0.3", None, float("nan"), [0.3]])
def test_an_amount_that_is_no_share_is_refused(amount):
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="fraction from 0 to below 1"):
        prune_unstructured(layer, amount, inplace=True)
    assert torch.equal(layer.weight, before)


def test_an_unknown_part_is_refused(small):
    for part in ("blocks", "input_blocks.99", "out.2.weight"):
        with pytest.raises(ValueError, match=f"UNet has no part '{part}'"):
            prune_unstructured(small.unet, 0.1, parts=[part])


def test_zeros_are_counted_as_they_are(small):
    unet = prune_unstructured(small.unet, 0.37)
    arrays = [np.array(p.tolist()) for p in unet.parameters()]
    total, nonzero = sum(a.size for a in arrays), sum(int((a != 0).sum()) for a in arrays)
    counted = count_zeros(unet)
    assert counted == ZeroCount(total, nonzero)
    assert counted.zero_fraction == pytest.approx((total - nonzero) / total, abs=1e-12)
    assert 0.3 < counted.zero_fraction < 0.37


def test_a_shared_or_negative_zero_weight_is_counted_once_and_as_zero():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, -0.0, 0.0], [1e-30, 2, 3], [4, 5, 6]]))
    assert count_zeros(nn.Sequential(first, second)) == ZeroCount(9, 7)
    assert count_zeros(nn.ReLU()).zero_fraction == 0


def test_at_stable_diffusion_1_5_five_percent_leave_the_published_number_of_weights():
    with torch.device("meta"):
        unet = UNet(SD15.unet)
    nonzero = sum(p.numel() for p in unet.parameters())
    assert nonzero == 859_520_964
    for name, layer in layers(unet).items():
        if in_blocks(name):
            nonzero -= sum(round(0.05 * p.numel()) for p in layer.parameters())
    assert nonzero == 816_658_036


@pytest.mark.slow
def test_stable_diffusion_1_5_random_weights_are_pruned_to_the_published_count():
    torch.manual_seed(0)
    unet = without_zeros(UNet(SD15.unet))
    assert count_zeros(unet) == ZeroCount(859_520_964, 859_520_964)
    block = [p for n, m in layers(unet).items() if in_blocks(n) for p in m.parameters()]
    for amount in (0.05, 0.3, 0.6, 0.95):
        # What went before is of the smallest, and goes first again.
        prune_unstructured(unet, amount, inplace=True)
        expected = 859_520_964 - sum(round(amount * p.numel()) for p in block)
        assert count_zeros(unet).nonzero == expected
        if amount == 0.05:
            assert expected == 816_658_036
            assert round(100 * count_zeros(unet).zero_fraction, 6) == 4.986839
