"""Attention in bfloat16 against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantized_models import calibrate, decibels, needs_kernels, quant_model, random, small_call

from sdcomp.integer import bfloat16_attention, to_int8
from sdcomp.integer.bfloat16_attention import BFloat16AttentionProduct, attention_dtype
from sdcomp.model.attention import AttentionProduct


@pytest.mark.parametrize("scores", [2**20, 1000, 7], ids=["whole", "some rows", "one row"])
@pytest.mark.parametrize(("tokens", "length"), [(64, 64), (50, 11), (9, 1)])
def test_it_agrees_with_pytorch_to_the_roundings_of_bfloat16(monkeypatch, scores, tokens, length):
    monkeypatch.setattr(bfloat16_attention, "_SCORES", scores)
    # Heads beside each other in memory, as the layers before give them.
    q, k, v = (random(2, n, 3, 10, seed=n + i).bfloat16().transpose(1, 2)
               for i, n in enumerate((tokens, length, length)))  # fmt: skip
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.no_grad():
        got = BFloat16AttentionProduct()(q, k, v)
    assert got.dtype is torch.bfloat16 and got.shape == wanted.shape
    # Three roundings to 8 bits: of scores, of probabilities and of the output.
    assert (got - wanted).norm() < 3 * 2**-8 * wanted.norm()


def test_other_types_and_gradients_go_to_pytorch():
    q, k, v = random(1, 2, 5, 4), random(1, 2, 3, 4, seed=1), random(1, 2, 3, 4, seed=2)
    assert torch.equal(BFloat16AttentionProduct()(q, k, v), AttentionProduct()(q, k, v))
    q = q.bfloat16().requires_grad_()
    BFloat16AttentionProduct()(q, k.bfloat16(), v.bfloat16()).sum().backward()
    assert q.grad.any()
    with torch.no_grad():
        nothing = BFloat16AttentionProduct()(q[:, :, :0], k.bfloat16(), v.bfloat16())
    assert nothing.shape == (1, 2, 0, 4)


@pytest.mark.parametrize("fast", [True, False])
def test_only_bfloat16_models_on_fast_cpus_use_it(monkeypatch, fast):
    monkeypatch.setattr(bfloat16_attention, "fast_bfloat16", lambda: fast)
    assert attention_dtype(torch.bfloat16) is (torch.bfloat16 if fast else torch.float32)
    assert attention_dtype(torch.float32) is torch.float32


@needs_kernels
def test_an_int8_model_in_bfloat16_changes_within_its_roundings(small, monkeypatch):
    call = small_call(small)
    m = to_int8(calibrate(quant_model(small.unet), call), torch.bfloat16)
    monkeypatch.setattr(bfloat16_attention, "fast_bfloat16", lambda: False)
    in_float32 = m(*call)
    monkeypatch.setattr(bfloat16_attention, "fast_bfloat16", lambda: True)
    got = m(*call)
    assert not torch.equal(got, in_float32)
    assert decibels(got, in_float32) > 20
