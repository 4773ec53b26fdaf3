"""Removal where it costs least: exact errors, corrected weights, whole blocks, files."""

import copy
import json

import pytest
import torch
from diffusers_keys import diffusers_unet, unet_state
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.model.bypass import Bypass
from sdcomp.model.channel_map import keep_units
from sdcomp.model.prune_groups import prune_groups
from sdcomp.model.unet import UNet
from sdcomp.pruning import (
    Calibration,
    apply_channel_map,
    calibrate,
    channel_map,
    count_zeros,
    prune_structured,
    remove_cheapest,
)
from sdcomp.pruning.least_squares import correct_inputs, removal_levels
from sdcomp.quantization import QuantModel

MIDDLE = "middle_block.1"
BLOCKS = {
    "residual": "output_blocks.0.0",
    "transformer": MIDDLE,
    "attention": f"{MIDDLE}.transformer_blocks.0.attn2",
    "feed-forward": f"{MIDDLE}.transformer_blocks.0.ff",
}


def inputs(config, size: int = 8):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, config.in_channels, size, size, generator=generator),
        torch.tensor([7, 903]),
        torch.randn(2, 5, config.context_dim, generator=generator),
    )


@pytest.fixture(scope="module")
def calibration(small):
    """Of a small model's own layers, by a few calls."""
    args = inputs(small.config.unet)
    return calibrate(small.unet, lambda: small.unet(*args), rows=10**6)


def observed(rows: int = 400, columns: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix + 3


def refit(weight, x, kept):
    """The least-squares weights and bias of the columns kept for the outputs of all, and the error left."""
    target = x @ weight.T
    design = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    found = torch.linalg.lstsq(design, target).solution
    return found, (design @ found - target).square().mean(0)


@pytest.mark.parametrize("width", [1, 3])
def test_errors_of_removal_are_those_of_exact_least_squares(width):
    x = observed()
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    gradients = torch.tensor([1.0, 0.1, 3.0, 2.0, 0.5])
    units = 12 // width
    levels, errors = removal_levels(
        weight.float(), torch.cov(x.T, correction=0).float(), gradients, units, damping=1e-6
    )
    assert [len(kept) for kept in levels] == list(range(units, -1, -1)) and errors[0] == 0

    def error(kept):
        columns = [unit * width + i for unit in kept for i in range(width)]
        return float(refit(weight, x, columns)[1] @ gradients.double())

    for before, kept, found in zip(levels, levels[1:], errors[1:], strict=False):
        assert found == pytest.approx(error(kept), rel=0.01)
        # Each the cheapest at its turn.
        others = [error([unit for unit in before if unit != gone]) for gone in before]
        assert error(kept) == pytest.approx(min(others), rel=0.01)


def test_several_units_go_in_a_step_where_there_are_many():
    x = observed()
    levels, errors = removal_levels(torch.randn(5, 12), torch.cov(x.T).float(), torch.ones(5), 12, steps=5)
    assert [len(kept) for kept in levels] == [12, 9, 6, 3, 0] and errors == sorted(errors)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_what_stays_is_corrected_by_least_squares(kind):
    torch.manual_seed(0)
    layer = nn.Linear(12, 5) if kind == "linear" else nn.Conv2d(3, 5, (2, 2))
    x = observed()
    kept = [0, 2]
    columns = [0, 1, 2, 3, 8, 9, 10, 11]
    weight, bias = layer.weight.detach().flatten(1).double(), layer.bias.detach().double()
    expected, _ = refit(weight, x, columns)
    correct_inputs(layer, 3, kept, torch.cov(x.T, correction=0).float(), x.mean(0).float(), damping=1e-7)
    new = layer.weight.detach().flatten(1).double()
    assert not new[:, 4:8].any()
    torch.testing.assert_close(new[:, columns], expected[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.bias.detach().double(), bias + expected[-1], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_what_the_output_does_not_feel_goes_first(small):
    unet = copy.deepcopy(small.unet)
    useless = {"output_blocks.1.0": [1, 4, 6], BLOCKS["feed-forward"]: list(range(40, 90))}
    unet.get_submodule("output_blocks.1.0").out_layers[3].weight.unflatten(1, (8, -1))[:, [1, 4, 6]] = 0
    unet.get_submodule(BLOCKS["feed-forward"]).net[2].weight[:, 40:90] = 0
    args = inputs(small.config.unet)
    expected = unet(*args)
    shares = {g.name: g.units for g in prune_groups(unet)}
    gone = sum(
        sum(getattr(layer, kind).numel() for layer, kind, *_ in group.slices(unet))
        * len(useless[group.name]) / shares[group.name]
        for group in prune_groups(unet) if group.name in useless
    )  # fmt: skip
    amount = 0.95 * gone / count_zeros(unet).total
    smaller = remove_cheapest(unet, amount, lambda: unet(*args))
    torch.testing.assert_close(smaller(*args), expected, rtol=1e-4, atol=1e-4)
    for name, kept in channel_map(smaller).items():
        assert set(range(shares[name])) - set(kept) <= set(useless[name])
    assert count_zeros(smaller).total <= (1 - amount) * count_zeros(unet).total


@torch.no_grad()
@pytest.mark.parametrize("amount", [0.3, 0.6, 0.8])
def test_the_amount_goes_and_the_map_makes_the_same_network(small, calibration, amount):
    smaller = remove_cheapest(small.unet, amount, calibration)
    assert count_zeros(smaller).total <= (1 - amount) * count_zeros(small.unet).total
    with torch.device("meta"):
        again = apply_channel_map(UNet(small.config.unet), json.loads(json.dumps(channel_map(smaller))))
    again.load_state_dict(smaller.state_dict(), strict=True, assign=True)
    args = inputs(small.config.unet)
    assert torch.equal(again(*args), smaller(*args))
    assert channel_map(small.unet) == {}


@torch.no_grad()
def test_it_hurts_less_than_equal_shares(small, calibration):
    args = inputs(small.config.unet)
    equal = prune_structured(small.unet, 0.4, mode="remove")
    amount = 1 - count_zeros(equal).total / count_zeros(small.unet).total
    cheapest = remove_cheapest(small.unet, amount, calibration)
    second = prune_structured(
        small.unet, 0.4, mode="remove", importance="second_order", calibration=calibration
    )
    errors = [float((unet(*args) - small.unet(*args)).square().mean()) for unet in (equal, second, cheapest)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.3 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_without_units_is_its_shortcut_and_a_bias(small, kind):
    unet, whole = copy.deepcopy(small.unet), copy.deepcopy(small.unet)
    group = next(g for g in prune_groups(unet) if g.name == BLOCKS[kind])
    keep_units(unet, group, [])
    assert isinstance(unet.get_submodule(group.name), Bypass)
    last = whole.get_submodule(f"{group.name}.{group.columns}")
    last.weight.zero_()
    args = inputs(small.config.unet)
    torch.testing.assert_close(unet(*args), whole(*args), rtol=1e-5, atol=1e-5)
    assert channel_map(unet) == {group.name: []}
    # Other groups can go on shrinking.
    smaller = prune_structured(unet, 0.5, mode="remove")
    again = apply_channel_map(UNet(small.config.unet), channel_map(smaller))
    again.load_state_dict(smaller.state_dict(), strict=True)


@torch.no_grad()
def test_a_model_without_blocks_is_saved_quantized_and_loaded(small, calibration, tmp_path):
    smaller = remove_cheapest(small.unet, 0.8, calibration)
    assert [] in channel_map(smaller).values()
    sdcomp.save(small.replace(unet=smaller), tmp_path / "model")
    loaded = sdcomp.load(tmp_path / "model").unet
    args = inputs(small.config.unet)
    assert torch.equal(loaded(*args), smaller(*args))
    assert QuantModel(smaller, act_quant_params=None)(*args).isfinite().all()


def image_unet(diffusers, scale: float):
    """A small UNet of diffusers without text; its attentions add their inputs themselves."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, mid_block_scale_factor=scale, downsample_type="resnet", upsample_type="resnet",
    ).eval()  # fmt: skip


@torch.no_grad()
def test_an_attention_that_adds_its_input_leaves_that_and_a_bias(diffusers):
    unet = image_unet(diffusers, 1)
    group = next(g for g in prune_groups(unet) if g.kind == "attention")
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    attention = unet.get_submodule(group.name)
    attention.to_out[0].weight.zero_()  # the output is the input and the bias now
    expected = attention(x)
    keep_units(unet, group, [])
    torch.testing.assert_close(unet.get_submodule(group.name)(x, temb=None), expected)


@torch.no_grad()
def test_unets_of_diffusers_without_text_run_with_few_blocks(diffusers):
    unet = image_unet(diffusers, 2**0.5)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smaller = remove_cheapest(unet, 0.6, lambda: unet(x, 10))
    assert smaller(x, 10).sample.shape == x.shape and smaller(x, 10).sample.isfinite().all()
    gone = [name for name, kept in channel_map(smaller).items() if not kept]
    assert any("attentions" in name for name in gone)
    # These scale their sums, and some resample their inputs.
    assert not any("mid_block" in name or "sampler" in name for name in gone)
    with pytest.raises(ValueError, match="'mid_block.resnets.0' must keep a unit"):
        apply_channel_map(unet, {"mid_block.resnets.0": []})


@torch.no_grad()
def test_blocks_of_diffusers_go_the_same_way(small, diffusers):
    theirs = diffusers_unet(diffusers, small.config.unet)
    theirs.load_state_dict(unet_state(small.unet))
    ours = copy.deepcopy(small.unet)
    for unet in (ours, theirs):
        for kind in ("residual", "attention", "feed-forward"):
            # The first of its kind is the same in both.
            group = next(g for g in prune_groups(unet) if g.kind == kind)
            keep_units(unet, group, [])
    latents, timesteps, context = inputs(small.config.unet)
    expected = ours(latents, timesteps, context)
    torch.testing.assert_close(theirs(latents, timesteps, context).sample, expected, rtol=1e-5, atol=1e-5)


def test_costs_say_what_is_worth_removing(small, calibration):
    name = "output_blocks.0.0"
    costs = {f"{name}.in_layers.2": 3.0, f"{name}.out_layers.3": 1.0, "out.2": 4.0}
    smaller = remove_cheapest(small.unet, 0.25, calibration, costs=costs)
    (kept,) = channel_map(smaller).values()
    assert len(kept) == 4  # half of what can go is a quarter of all
    with pytest.raises(ValueError, match="can save 4, less than 7.2"):
        remove_cheapest(small.unet, 0.9, calibration, costs=costs)


def test_widths_are_kept_at_multiples(small, calibration):
    smaller = remove_cheapest(small.unet, 0.5, calibration, multiple=8)
    for name, module in smaller.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "input_blocks.0.0":
            assert module.weight.shape[1] % 8 == 0, name
    with pytest.raises(ValueError, match="multiple must be at least 1, not 0"):
        remove_cheapest(small.unet, 0.5, calibration, multiple=0)


def test_only_the_parts_lose_units(small, calibration):
    smaller = remove_cheapest(small.unet, 0.05, calibration, parts=["middle_block"])
    assert all(name.startswith("middle_block") for name in channel_map(smaller))
    with pytest.raises(ValueError, match="all layers together can save"):
        remove_cheapest(small.unet, 0.9, calibration, parts=["middle_block"])
    with pytest.raises(UserError, match="has no means of layer"):
        remove_cheapest(small.unet, 0.1, Calibration(calibration.moments, {}, calibration.gradients))
