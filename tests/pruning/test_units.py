"""Units that are removed together: pairs of heads, and what saved channel maps say of them."""

import dataclasses

import pytest
import torch

from sdcomp.model import TINY, UNet
from sdcomp.pruning import apply_channel_map, channel_map, prune_structured, units

ATTENTION = "middle_block.1.transformer_blocks.0.attn1"


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(dataclasses.replace(TINY.unet, num_heads=8))


@pytest.mark.parametrize(("together", "kept"), [(1, [0, 2, 4, 6]), (2, [2, 3, 6, 7]), (4, [4, 5, 6, 7])])
def test_neighbouring_heads_go_together(unet, monkeypatch, together, kept):
    monkeypatch.setattr(units, "HEADS_PER_UNIT", together)
    # Odd heads are weakest; of the pairs the first and the third.
    size = torch.tensor([1.0, 0.0, 1.2, 0.1, 1.05, 0.05, 1.3, 0.2])
    block = unet.get_submodule(ATTENTION)
    width = block.to_v.out_features // 8
    for layer in (block.to_q, block.to_k, block.to_v):
        layer.weight.data.fill_(1.0).mul_(size.repeat_interleave(width)[:, None])
    block.to_out[0].weight.data.fill_(1.0).mul_(size.repeat_interleave(width))
    smaller = prune_structured(unet, 0.5, mode="remove", parts=[ATTENTION])
    assert channel_map(smaller) == {ATTENTION: kept}
    assert smaller.get_submodule(ATTENTION).heads == 4
    # A channel map counts heads, so it fits with units of any size.
    monkeypatch.setattr(units, "HEADS_PER_UNIT", 1)
    again = apply_channel_map(UNet(unet.config), channel_map(smaller))
    again.load_state_dict(smaller.state_dict(), strict=True)


def test_smaller_models_go_on_shrinking_in_pairs(unet, monkeypatch):
    monkeypatch.setattr(units, "HEADS_PER_UNIT", 2)
    once = prune_structured(unet, 0.25, mode="remove", parts=[ATTENTION])
    twice = prune_structured(once, 0.34, mode="remove", parts=[ATTENTION])
    (kept,) = channel_map(twice).values()
    assert len(kept) == 4
    assert [(a % 2, b - a) for a, b in zip(kept[::2], kept[1::2], strict=True)] == [(0, 1), (0, 1)]


def test_an_odd_number_of_heads_is_removed_one_by_one(monkeypatch):
    monkeypatch.setattr(units, "HEADS_PER_UNIT", 2)
    config = dataclasses.replace(TINY.unet, model_channels=96, norm_groups=32, num_heads=3)
    (group,) = units.groups_below(UNet(config), [ATTENTION])
    assert group.units == 3
