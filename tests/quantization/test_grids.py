"""Affine grids, groups of columns and grids of tokens, against PyTorch's operators and brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization import Calibrator, QuantModel, UniformQuantizer
from sdcomp.quantization.ranges import Histogram
from sdcomp.quantization.scales import Grid

finite = st.floats(-1e4, 1e4, width=32)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def after_silu(*shape: int) -> torch.Tensor:
    return nn.functional.silu(2 * random(*shape))


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_an_affine_grid_rounds_as_pytorchs_operators_do(n_bits):
    x = after_silu(6, 500)
    quantizer = UniformQuantizer(n_bits, symmetric=False)
    grid = quantizer.grid(x)
    high, zero = 2**n_bits - 1, int(grid.zero_point.item())
    expected = torch.fake_quantize_per_tensor_affine(x, grid.scale.item(), zero, 0, high)
    assert torch.equal(quantizer(x), expected)
    channels = UniformQuantizer(n_bits, "channel", symmetric=False)
    scale, zeros = channels.grid(x)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zeros.int(), 0, 0, high)
    assert torch.equal(channels(x), expected)
    assert torch.equal(scale, (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / high)


def test_an_affine_grid_serves_one_sided_values_twice_as_finely():
    x = after_silu(20_000)
    errors = [
        (UniformQuantizer(4, symmetric=symmetric, scale_method=method)(x) - x).abs().pow(2.4).mean()
        for symmetric, method in itertools.product((True, False), ("max", "mse"))
    ]
    assert errors[2] < 0.6 * errors[0] and errors[3] < 0.6 * errors[1] and errors[3] < errors[2]


@pytest.mark.parametrize("columns", [64, 70, 5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_group_is_a_tensor_of_its_own(columns, symmetric, method):
    x = random(3, columns)
    quantizer = UniformQuantizer(3, "group", symmetric, method, group_size=32)
    grid, made = quantizer.grid(x), quantizer(x)
    assert grid.scale.shape == (3, -(-columns // 32))
    alone = UniformQuantizer(3, "channel", symmetric)
    for i, part in enumerate(x.split(32, dim=1)):
        own = Grid(*(g if g is None else g[:, i] for g in grid))
        assert torch.equal(made[:, 32 * i : 32 * i + 32], alone.simulate(part, own))
        assert torch.equal(own.scale, own.scale.half().float())
        if method == "max":
            torch.testing.assert_close(own.scale, alone.grid(part).scale, rtol=1e-3, atol=0)
        else:
            whole = (alone(part) - part).abs().pow(2.4).sum(1)
            assert ((alone.simulate(part, own) - part).abs().pow(2.4).sum(1) <= whole * 1.01).all()


def test_groups_of_a_convolution_are_those_of_its_matrix():
    weight = random(4, 6, 3, 3)
    quantizer = UniformQuantizer(4, "group", group_size=16)
    assert torch.equal(quantizer(weight), quantizer(weight.flatten(1)).view_as(weight))
    assert quantizer.grid(weight).scale.shape == (4, 4)


def test_a_token_has_its_own_grid():
    x = random(2, 5, 8) * torch.logspace(-2, 2, 5)[:, None]
    quantizer = UniformQuantizer(8, "token", symmetric=False)
    made = quantizer(x)
    for i, j in itertools.product(range(2), range(5)):
        assert torch.equal(made[i, j], UniformQuantizer(8, symmetric=False)(x[i, j]))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=40),
    n_bits=st.integers(2, 8),
    method=st.sampled_from(["max", "mse"]),
)
def test_the_laws_of_an_affine_grid(values, n_bits, method):
    quantizer = UniformQuantizer(n_bits, symmetric=False, scale_method=method)
    x = torch.tensor(values, dtype=torch.float32)
    grid = quantizer.grid(x)
    made = quantizer.simulate(x, grid)
    assert 0 <= grid.zero_point.item() <= 2**n_bits - 1 == quantizer.qmax
    assert torch.equal(quantizer.simulate(made, grid), made)  # idempotent
    assert torch.equal(quantizer.dequantize(quantizer.integers(x, grid), grid), made)
    assert quantizer.simulate(torch.zeros(1), grid).item() == 0
    assert (made[x.argsort()].diff() >= 0).all()  # monotone
    assert len(made.unique()) <= 2**n_bits


@pytest.mark.parametrize("n_bits", [3, 4, 8])
@pytest.mark.parametrize("shape", ["silu", "shifted", "negative"])
def test_affine_ranges_of_histograms_are_near_brute_force(n_bits, shape):
    x = after_silu(20_000)
    x = {"silu": x, "shifted": random(20_000) + 0.7, "negative": -x}[shape]
    x[:5] *= 4  # outliers

    def error(low: float, high: float) -> float:
        quantizer = UniformQuantizer(n_bits, symmetric=False)
        grid = quantizer.grid_of_range(torch.tensor([low]), torch.tensor([high]))
        return (quantizer.simulate(x, grid) - x).abs().pow(2.4).sum().item()

    shares = np.linspace(0.04, 1, 25)
    ends = min(x.min().item(), 0), max(x.max().item(), 0)
    best = min(error(a * ends[0], b * ends[1]) for a in shares for b in shares)
    histogram = Histogram()
    for part in x.split(3000):
        histogram.add(Histogram.of(part))
    found = histogram.range("mse", 2**n_bits - 1, symmetric=False)
    assert ends[0] <= found[0] <= 0 <= found[1] <= ends[1]
    assert error(*found) <= 1.05 * best


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"granularity": "row"}, "granularity must be one of"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"norm": 0.5}, "norm must be a number from 1 to 16"),
        ({"n_bits": 9}, "n_bits must be 2 to 8"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        UniformQuantizer(**wrong)


def test_sides_take_only_the_granularities_that_fit_them():
    with pytest.raises(ValueError, match="granularity of activations must be one of tensor, token"):
        QuantModel(nn.Linear(4, 4), act_quant_params={"granularity": "group"})
    with pytest.raises(ValueError, match="granularity of weights must be one of"):
        QuantModel(nn.Linear(4, 4), weight_quant_params={"granularity": "token"})


def test_tokens_need_no_calibration():
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(2), nn.Linear(16, 5))
    q = QuantModel(module, act_quant_params={"granularity": "token", "symmetric": False, "n_bits": 4})
    x, quantizer = random(2, 2, 4, 4), UniformQuantizer(4, symmetric=False)
    assert q.calibrated
    conv, linear = q.quantized_layers()
    images = torch.stack([quantizer(image) for image in x])
    h = nn.functional.conv2d(images, conv.fake_weight(), conv.bias, padding=1).flatten(2)
    tokens = torch.stack([torch.stack([quantizer(token) for token in image]) for image in h])
    assert torch.equal(q(x), nn.functional.linear(tokens, linear.fake_weight(), linear.bias))


def test_affine_inputs_are_calibrated_to_their_two_ends():
    module = nn.Sequential(nn.SiLU(), nn.Linear(64, 3))
    q = QuantModel(module, act_quant_params={"n_bits": 8, "symmetric": False})
    x = random(10, 64)
    Calibrator(None, q).observe(lambda: [q(part) for part in x.split(4)])
    (layer,) = q.quantized_layers()
    h = nn.functional.silu(x)
    scale = (h.max() - h.min()) / 255
    torch.testing.assert_close(layer.act_scale, scale.view(1))
    assert layer.act_zero_point.item() == round((-h.min() / scale).item())
    expected = torch.fake_quantize_per_tensor_affine(
        h, layer.act_scale.item(), int(layer.act_zero_point.item()), 0, 255
    )
    assert torch.equal(q(x), nn.functional.linear(expected, layer.fake_weight(), layer.bias))


def test_merged_ranges_are_those_of_all_calls_together():
    module = nn.Linear(50, 2)
    q = QuantModel(module, act_quant_params={"n_bits": 4, "scale_method": "mse"})
    parts = [random(100, 50), 3 * random(20, 50, seed=1)]
    Calibrator(None, q, act_update_policy="merged").observe(lambda: [q(part) for part in parts])
    everything = Histogram.of(torch.cat(parts)).range("mse", 7)[1] / 7
    assert q.quantized_layers()[0].act_scale.item() == pytest.approx(everything)


def test_overrides_change_the_layers_that_they_match(small):
    q = QuantModel(
        small.unet,
        weight_quant_params={"n_bits": 4},
        act_quant_params={"n_bits": 4, "symmetric": False},
        overrides={
            "time_embed": {"weight_quant_params": {"n_bits": 8}, "act_quant_params": None},
            "time_embed.2": {"act_quant_params": {"n_bits": 6}},
        },
    )
    layers = {layer.name: layer.spec for layer in q.quantized_layers()}
    assert (
        layers["time_embed.0"].weight_quantizer.n_bits == 8 and layers["time_embed.0"].act_quantizer is None
    )
    again = layers["time_embed.2"].act_quantizer  # the last override decides
    assert again.n_bits == 6 and not again.symmetric
    assert layers["out.2"].act_quantizer == UniformQuantizer(4, symmetric=False)
    with pytest.raises(UserError, match="override 'nowhere' matches no quantized layer"):
        QuantModel(small.unet, overrides={"nowhere": {}})
    with pytest.raises(ValueError, match="may have weight_quant_params and act_quant_params only"):
        QuantModel(small.unet, overrides={"out": {"n_bits": 8}})


def test_the_ends_of_a_unet_keep_eight_bits(small):
    q = QuantModel(
        small.unet, weight_quant_params={"n_bits": 4}, act_quant_params=None, overrides="ends_at_8_bits"
    )
    bits = {layer.name: layer.weight_quantizer.n_bits for layer in q.quantized_layers()}
    eight = {name for name, n in bits.items() if n == 8}
    assert {"input_blocks.0.0", "time_embed.0", "time_embed.2", "out.2"} <= eight
    assert any(name.endswith("attn2.to_k") for name in eight) and set(bits.values()) == {4, 8}
    assert not any(".attn1." in name or ".in_layers." in name for name in eight)
    assert all(layer.act_quantizer is None for layer in q.quantized_layers())
