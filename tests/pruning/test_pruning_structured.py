"""Masks against PyTorch's own, and networks that are really smaller: outputs, shapes, scores, files."""

import copy
import json
from collections import Counter

import pytest
import torch
from conftest import without_zeros
from diffusers_keys import diffusers_unet, unet_state
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from sdcomp.model import SD15
from sdcomp.model.prune_groups import prune_groups
from sdcomp.model.unet import UNet
from sdcomp.pruning import apply_channel_map, channel_map, count_zeros, prune_structured

BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")
RES, ATTENTION, FEED_FORWARD = (
    "output_blocks.0.0",
    "middle_block.1.transformer_blocks.0.attn2",
    "middle_block.1.transformer_blocks.0.ff",
)


def block_layers(unet: nn.Module) -> list[nn.Module]:
    return [
        m for name, m in unet.named_modules()
        if name.startswith(BLOCKS) and isinstance(m, nn.Conv2d | nn.Linear)
    ]  # fmt: skip


def inputs(config, batch: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(batch, config.in_channels, size, size, generator=generator),
        torch.tensor([7, 903])[:batch],
        torch.randn(batch, 5, config.context_dim, generator=generator),
    )


@torch.no_grad()
def zero_units(unet: nn.Module, share: float, seed: int = 0) -> None:
    """Make random units of our UNet exactly zero, each tensor spelt out."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(n: int) -> list[int]:
        return torch.randperm(n, generator=generator)[: round(share * n)].tolist()

    for m in unet.modules():
        kind = type(m).__name__
        if kind == "ResBlock":
            norm = m.out_layers[0]
            width = norm.num_channels // norm.num_groups
            for g in chosen(norm.num_groups):
                own = slice(g * width, (g + 1) * width)
                for layer in (m.in_layers[2], m.emb_layers[1], norm):
                    layer.weight[own] = 0
                    layer.bias[own] = 0
                m.out_layers[3].weight[:, own] = 0
        elif kind == "CrossAttention":
            width = m.to_q.out_features // m.heads
            for head in chosen(m.heads):
                own = slice(head * width, (head + 1) * width)
                for layer in (m.to_q, m.to_k, m.to_v):
                    layer.weight[own] = 0
                m.to_out[0].weight[:, own] = 0
        elif kind == "FeedForward":
            hidden = m.net[2].in_features
            for i in chosen(hidden):
                for row in (i, i + hidden):
                    m.net[0].proj.weight[row] = 0
                    m.net[0].proj.bias[row] = 0
                m.net[2].weight[:, i] = 0


@pytest.mark.parametrize(
    ("amount", "n"), [(0, 2), (0.05, 2), (0.45, 2), (0.9, 2), (0.3, 1), (0.3, float("inf"))]
)
def test_masks_are_exactly_pytorchs_ln_structured(small, amount, n):
    expected = copy.deepcopy(small.unet)
    for layer in block_layers(expected):
        prune.ln_structured(layer, "weight", float(amount), n=n, dim=0)
        prune.remove(layer, "weight")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        unet = copy.deepcopy(small.unet).to(memory_format=memory_format)
        pruned = prune_structured(unet, amount, n=n)
        state, wanted = pruned.state_dict(), expected.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)
        assert all(torch.equal(t, small.unet.state_dict()[name]) for name, t in unet.state_dict().items())


def test_masked_channels_that_tie_are_pytorchs_too():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 40, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(1, 3, layer.weight.shape))
    expected = copy.deepcopy(layer)
    prune.ln_structured(expected, "weight", 0.3, n=2, dim=0)
    assert torch.equal(prune_structured(layer, 0.3).weight, expected.weight)


def published_nonzero(unet: nn.Module, amount: float) -> int:
    """What masks leave: whole rows of weights, all biases and norms."""
    nonzero = sum(p.numel() for p in unet.parameters())
    for layer in block_layers(unet):
        rows = layer.weight.shape[0]
        nonzero -= round(amount * rows) * layer.weight[0].numel()
    return nonzero


def test_at_stable_diffusion_1_5_five_percent_of_channels_leave_the_published_number_of_weights():
    with torch.device("meta"):
        unet = UNet(SD15.unet)
    assert published_nonzero(unet, 0.05) == 816_670_084
    assert round(100 * (1 - 816_670_084 / 859_520_964), 6) == 4.985437


@pytest.mark.slow
def test_at_stable_diffusion_1_5_random_weights_are_masked_to_the_published_count():
    torch.manual_seed(0)
    unet = without_zeros(UNet(SD15.unet))
    for amount in (0.05, 0.1, 0.3, 0.45):
        # Masks of a greater amount hold those of a smaller one.
        prune_structured(unet, amount, inplace=True)
        assert count_zeros(unet).nonzero == published_nonzero(unet, amount)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_removing_what_is_zero_leaves_the_output(tiny, share):
    unet = copy.deepcopy(tiny.unet)
    zero_units(unet, share)
    smaller = prune_structured(unet, share, mode="remove")
    args = inputs(tiny.config.unet, size=16)
    with torch.no_grad():
        expected, whole = unet(*args), tiny.unet(*args)
        torch.testing.assert_close(smaller(*args), expected, rtol=0, atol=1e-5)
    assert (expected - whole).abs().max() > 0.01
    # The zeros are gone, and only they.
    assert count_zeros(smaller) == type(count_zeros(smaller))(
        count_zeros(unet).nonzero, count_zeros(unet).nonzero
    )


@pytest.mark.slow
def test_removing_what_is_zero_leaves_the_output_of_stable_diffusion_1_5(randomize):
    unet = without_zeros(randomize(UNet(SD15.unet), 0))
    zero_units(unet, 0.25)
    args = inputs(SD15.unet, batch=1, size=16)
    with torch.no_grad():
        expected = unet(*args)
        prune_structured(unet, 0.25, mode="remove", inplace=True)
        torch.testing.assert_close(unet(*args), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert count_zeros(unet).zero_fraction == 0


def test_shapes_and_counters_of_what_remains(small):
    before, unet = small.unet, prune_structured(small.unet, 0.5, mode="remove")
    block, was = unet.get_submodule(RES), before.get_submodule(RES)
    assert block.in_layers[2].weight.shape[0] == was.in_layers[2].weight.shape[0] // 2 == 16
    assert block.in_layers[2].out_channels == block.out_layers[3].in_channels == 16
    assert block.emb_layers[1].out_features == len(block.emb_layers[1].bias) == 16
    assert (block.out_layers[0].num_groups, block.out_layers[0].num_channels) == (4, 16)
    assert block.out_layers[3].weight.shape == (32, 16, 3, 3)
    attention = unet.get_submodule(ATTENTION)
    assert attention.heads == 1 and attention.to_k.weight.shape == (16, 32)
    assert attention.to_out[0].weight.shape == (32, 16)
    feed_forward = unet.get_submodule(FEED_FORWARD)
    assert feed_forward.net[0].proj.weight.shape == (128, 32) and feed_forward.net[2].in_features == 64
    # What is no group's stays, and so does the module that was given.
    for name, parameter in unet.named_parameters():
        whole = before.get_parameter(name)
        assert parameter.requires_grad and whole.dim() == parameter.dim()
    assert channel_map(before) == {} and before.get_submodule(ATTENTION).heads == 2


def test_at_least_one_unit_stays_and_amounts_round(small):
    groups = {group.name: group for group in prune_groups(prune_structured(small.unet, 0.99, mode="remove"))}
    assert {groups[name].units for name in (RES, ATTENTION)} == {1}
    assert groups[FEED_FORWARD].units == 1
    whole = prune_structured(small.unet, 0.2, mode="remove")
    assert whole.get_submodule(ATTENTION).heads == 2  # round(0.2 * 2) = 0
    assert whole.get_submodule(FEED_FORWARD).net[2].in_features == 128 - 26


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_units_of_least_norm_go(small, criterion):
    p = {"l1": 1, "l2": 2}[criterion]
    unet = prune_structured(small.unet, 0.5, mode="remove", criterion=criterion)
    kept = channel_map(unet)
    block = small.unet.get_submodule(RES)
    width = block.out_layers[0].num_channels // block.out_layers[0].num_groups
    scores = []
    for g in range(block.out_layers[0].num_groups):
        own = slice(g * width, (g + 1) * width)
        tensors = [block.in_layers[2].weight[own], block.in_layers[2].bias[own]]
        tensors += [block.emb_layers[1].weight[own], block.emb_layers[1].bias[own]]
        tensors += [block.out_layers[0].weight[own], block.out_layers[0].bias[own]]
        tensors += [block.out_layers[3].weight[:, own]]
        scores.append(sum((t.detach().double().abs() ** p).sum().item() for t in tensors))
    assert kept[RES] == sorted(sorted(range(len(scores)), key=scores.__getitem__)[4:])
    feed_forward = small.unet.get_submodule(FEED_FORWARD)
    proj, out, h = feed_forward.net[0].proj, feed_forward.net[2], 128
    scores = []
    for i in range(h):
        tensors = [proj.weight[i], proj.weight[i + h], proj.bias[[i, i + h]], out.weight[:, i]]
        scores.append(sum((t.detach().double().abs() ** p).sum().item() for t in tensors))
    assert kept[FEED_FORWARD] == sorted(sorted(range(h), key=scores.__getitem__)[64:])


def test_a_channel_map_and_a_state_dict_make_the_same_network(small):
    unet = prune_structured(small.unet, 0.3, mode="remove")
    again = prune_structured(unet, 0.5, mode="remove")  # and what was smaller becomes smaller yet
    file = save({name: t.contiguous() for name, t in again.state_dict().items()})
    record = json.loads(json.dumps(channel_map(again)))
    with torch.device("meta"):
        loaded = UNet(small.config.unet)
    assert apply_channel_map(loaded, record) is loaded
    loaded.load_state_dict(load(file), strict=True, assign=True)
    args = inputs(small.config.unet)
    with torch.no_grad():
        assert torch.equal(loaded(*args), again(*args))
    assert channel_map(loaded) == record
    # The record tells where each weight was.
    hidden = record[FEED_FORWARD]
    dense, small_one = (u.get_submodule(FEED_FORWARD).net[0].proj.weight for u in (small.unet, again))
    assert torch.equal(small_one, dense[hidden + [128 + i for i in hidden]])


def test_a_map_of_something_else_is_refused(small):
    good = channel_map(prune_structured(small.unet, 0.5, mode="remove"))
    for bad, message in (
        ([], "is a table of groups, not list"),
        ({"input_blocks.77": [0]}, "UNet has no group 'input_blocks.77'"),
        ({**good, ATTENTION: [2]}, "numbers from 0 to 1"),
        ({**good, ATTENTION: [-1]}, "numbers from 0 to 1"),
        ({**good, ATTENTION: [True]}, "numbers from 0 to 1"),
        ({**good, "middle_block.1": []}, "is inside a block that is gone"),
        ({**good, ATTENTION: 1}, "numbers from 0 to 1"),
        ({**good, ATTENTION: [1, 0]}, "increasing order"),
        ({**good, RES: [0, 0]}, "increasing order"),
    ):
        unet = UNet(small.config.unet)
        shapes = [p.shape for p in unet.parameters()]
        with pytest.raises(ValueError, match=message):
            apply_channel_map(unet, bad)
        assert [p.shape for p in unet.parameters()] == shapes
    with pytest.raises(ValueError, match="lost channels already"):
        apply_channel_map(prune_structured(small.unet, 0.5, mode="remove"), good)
    assert apply_channel_map(nn.ReLU(), {}) is not None


def test_removal_saves_multiplications_in_the_share_removed(tiny):
    def macs(unet):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(*inputs(tiny.config.unet, batch=1, size=16))
        return counter.get_total_flops() / 2

    smaller = prune_structured(tiny.unet, 0.5, mode="remove")
    # Of each layer that takes part, half; the others (norms aside, projections in and out) stay.
    assert 0.55 < macs(smaller) / macs(tiny.unet) < 0.7
    masked = prune_structured(tiny.unet, 0.5)
    assert macs(masked) == macs(tiny.unet)


def test_parts_choose_the_groups(small):
    unet = prune_structured(small.unet, 0.5, mode="remove", parts=["middle_block.1", RES])
    assert set(channel_map(unet)) == {
        RES, ATTENTION, FEED_FORWARD, "middle_block.1.transformer_blocks.0.attn1",
    }  # fmt: skip
    assert set(channel_map(prune_structured(small.unet, 0.5, mode="remove", parts=[""]))) == {
        group.name for group in small.unet.prune_groups() if group.units > 1
    }
    for parts, message in ((["out"], "below 'out' there is nothing"), (["middle"], "no part 'middle'")):
        with pytest.raises(ValueError, match=message):
            prune_structured(small.unet, 0.5, mode="remove", parts=parts)
    with pytest.raises(ValueError, match="must be a list of names"):
        prune_structured(small.unet, 0.5, parts="middle_block")


def test_every_block_says_what_can_go():
    with torch.device("meta"):
        groups = UNet(SD15.unet).prune_groups()
    count = Counter(group.kind for group in groups)
    assert count == {"residual": 22, "transformer": 16, "attention": 32, "feed-forward": 16}
    assert {g.units for g in groups if g.kind == "residual"} == {32}
    assert {g.units for g in groups if g.kind == "attention"} == {8}


def test_diffusers_unet_shrinks_the_same_way(small, diffusers):
    theirs = diffusers_unet(diffusers, small.config.unet)
    theirs.load_state_dict(unet_state(small.unet))
    smaller = prune_structured(theirs, 0.5, mode="remove")
    ours = prune_structured(small.unet, 0.5, mode="remove")
    latents, timesteps, context = inputs(small.config.unet)
    with torch.no_grad():
        # Of the same units, as their scores are the same.
        expected = ours(latents, timesteps, context)
        got = smaller(latents, timesteps, context).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    again = apply_channel_map(diffusers_unet(diffusers, small.config.unet), channel_map(smaller))
    again.load_state_dict(smaller.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(latents, timesteps, context).sample, got)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amount": 1.3}, "fraction from 0 to below 1"),
        ({"mode": "masks"}, "mode must be 'mask' or 'remove', not 'masks'"),
        ({"mode": "remove", "criterion": "l3"}, "criterion must be 'l1' or 'l2'"),
        ({"criterion": "l1"}, "belongs to mode 'remove'"),
        ({"mode": "remove", "n": 1}, "n belongs to mode 'mask'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_changed(small, arguments, message):
    unet = copy.deepcopy(small.unet)
    with pytest.raises(ValueError, match=message):
        prune_structured(unet, **{"amount": 0.5, "inplace": True, **arguments})
    assert all(torch.equal(t, small.unet.state_dict()[name]) for name, t in unet.state_dict().items())


def test_a_module_without_groups_is_refused():
    with pytest.raises(ValueError, match="nothing can be removed from Linear"):
        prune_structured(nn.Linear(4, 4), 0.5, mode="remove")
