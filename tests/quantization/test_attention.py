"""Attention's quantized products against plain PyTorch."""

import pytest
import torch
from torch import nn

from sdcomp.errors import UserError
from sdcomp.export.graph import GraphUNet
from sdcomp.integer import to_int8, to_packed
from sdcomp.model.attention import AttentionProduct, CrossAttention
from sdcomp.quantization import Calibrator, QuantModel, load_quant_model, save_quant_model
from sdcomp.quantization.rounding_gradients import trainable

TOKENS = {"n_bits": 8, "granularity": "token"}


def rounded(x: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Each row along the last dimension rounded to its own symmetric grid, by PyTorch's operator."""
    qmax = 2 ** (n_bits - 1) - 1
    rows = x.reshape(-1, x.shape[-1])
    scale = rows.abs().amax(1) / qmax
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -qmax, qmax).view(x.shape)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_bits: int) -> torch.Tensor:
    q, k, v = rounded(q, n_bits), rounded(k, n_bits), rounded(v.transpose(2, 3), n_bits).transpose(2, 3)
    probabilities = torch.softmax(torch.einsum("bhnd,bhld->bhnl", q, k) / q.shape[-1] ** 0.5, dim=-1)
    step = probabilities.amax(-1, keepdim=True) / (2**n_bits - 1)
    return torch.einsum("bhnl,bhld->bhnd", (probabilities / step).round() * step, v)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_the_four_factors_are_rounded(n_bits):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    product = nn.Sequential(nn.Linear(8, 8), AttentionProduct())
    act = {"n_bits": n_bits, "granularity": "token"}
    model = QuantModel(product, act_quant_params=act, quantize_attention_products=True)
    found, expected = model.module[1](q, k, v), attention(q, k, v, n_bits)
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    assert (found - expected).abs().max() < 0.01 * (expected - plain).abs().max()


@pytest.mark.parametrize("n_bits", [4, 8])
def test_scores_round_queries_and_keys_head_by_head(n_bits):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    k[1, 2] = 0
    product = nn.Sequential(nn.Linear(8, 8), AttentionProduct())
    model = QuantModel(product, act_quant_params={"n_bits": n_bits}, quantize_attention_products="scores")
    model.is_calibrated.fill_(True)
    heads = [rounded(x[:, :, None].flatten(3), n_bits).view(x.shape) for x in (q, k + (k == 0) * 1e-30)]
    expected = nn.functional.scaled_dot_product_attention(*heads, v)
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    found = model.module[1](q, k, v)
    assert (found - expected).abs().max() < 1e-5 < (expected - plain).abs().max()


def test_only_what_was_asked_for_is_rounded():
    torch.manual_seed(0)
    layer, x = CrossAttention(16, 16, 2).requires_grad_(False), torch.randn(2, 9, 16)
    plain = QuantModel(layer, act_quant_params=TOKENS)
    model = QuantModel(layer, act_quant_params=TOKENS, quantize_attention_products=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(model(x), plain(x))
    both = model.set_use_quant(activations=False), plain.set_use_quant(activations=False)
    assert torch.equal(*(m(x) for m in both))
    assert torch.equal(model.set_use_quant(False, False)(x), layer(x))


@pytest.mark.parametrize("asked", [True, "scores"])
def test_images_do_not_depend_on_their_row(small, asked):
    model = QuantModel(small.unet, act_quant_params=TOKENS, quantize_attention_products=asked)
    torch.manual_seed(0)
    latents, context = torch.randn(3, 4, 16, 16), torch.randn(3, 5, 32)
    there = model(latents, 7, context)
    back = model(latents.flip(0), 7, context.flip(0)).flip(0)
    assert torch.equal(there, back)


def test_calibration_sees_the_inputs_of_the_plain_model(small):
    models = [QuantModel(small.unet, quantize_attention_products=asked) for asked in (False, True)]
    for model in models:
        Calibrator(small, model).calibrate(["a star"], steps=2)
    scales = [[layer.act_scale for layer in model.quantized_layers()] for model in models]
    assert all(map(torch.equal, *scales))


@pytest.mark.parametrize("asked", [True, "scores"])
def test_a_saved_model_still_rounds_them(small, tmp_path, asked):
    model = QuantModel(small.unet, act_quant_params=TOKENS, quantize_attention_products=asked)
    again = load_quant_model(save_quant_model(model, tmp_path), small.unet)
    args = torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 32)
    assert torch.equal(again(*args), model(*args))


@pytest.mark.parametrize("asked", [True, "scores"])
def test_what_cannot_compute_them_says_so(small, asked):
    model = QuantModel(small.unet, quantize_attention_products=asked)
    Calibrator(small, model).calibrate(["a star"], steps=2)
    for convert in (to_int8, to_packed, trainable):
        with pytest.raises(UserError, match="cannot quantize attention's products: make the model without"):
            convert(model)
    if asked is True:
        with pytest.raises(UserError, match='without quantize_attention_products or with "scores"'):
            GraphUNet(model, None)
    to_packed(model.set_use_quant(activations=False))


def test_wrong_requests_are_refused(small):
    with pytest.raises(ValueError, match="must be False, True or \"scores\", not 'score'"):
        QuantModel(small.unet, quantize_attention_products="score")
    # Saved models with these could not be loaded.
    for asked in (1, 0, None, ["scores"]):
        with pytest.raises(ValueError, match='must be False, True or "scores", not'):
            QuantModel(small.unet, quantize_attention_products=asked)
    with pytest.raises(ValueError, match="needs act_quant_params"):
        QuantModel(small.unet, act_quant_params=None, quantize_attention_products=True)
    with pytest.raises(ValueError, match="Linear has no AttentionProduct"):
        QuantModel(nn.Linear(4, 4), quantize_attention_products=True)
