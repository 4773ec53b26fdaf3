"""Profiling: counts against arithmetic by hand, and times that add up."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdcomp.errors import NonFiniteError
from sdcomp.evaluation import component_times, layer_profile, machine_peaks, macs, timing, weight_bytes
from sdcomp.integer import to_packed
from sdcomp.model.attention import CrossAttention
from sdcomp.model.device import computes_bfloat16
from sdcomp.quantization import QuantModel


def test_macs_of_known_layers():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert macs(conv, torch.randn(2, 3, 5, 5)) == 2 * 8 * 25 * 27
    attention = CrossAttention(16, 12, 2)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 12)
    projections = 2 * (9 * 16 * 16 + 2 * 5 * 12 * 16 + 9 * 16 * 16)
    scores_and_values = 2 * 2 * 9 * 5 * 16
    assert macs(attention, x, context) == projections + scores_and_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_macs_need_no_values_and_do_not_depend_on_the_type(small, dtype):
    inputs = torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 32)
    shapes = [part.to("meta", dtype) if isinstance(part, torch.Tensor) else part for part in inputs]
    unet = copy.deepcopy(small.unet).to("meta", dtype)
    assert macs(unet, *shapes) == macs(small.unet, *inputs) > 0


def test_weight_bytes_count_shared_weights_once():
    layer = nn.Linear(4, 4)
    assert weight_bytes(layer) == 4 * 20
    twice = nn.Sequential(layer, nn.Linear(4, 4, bias=False))
    twice[1].weight = layer.weight
    assert weight_bytes(twice) == 4 * 20
    assert weight_bytes(layer.half()) == 2 * 20


def test_weight_bytes_tell_views_and_tensors_without_data_apart():
    module, table = nn.Module(), torch.zeros(10, 10)
    module.register_buffer("table", table)
    module.register_buffer("row", table[:1])
    assert weight_bytes(module) == 4 * 100
    module.table = None
    assert weight_bytes(module) == 4 * 10
    assert weight_bytes(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")) == 2 * 4 * 20


def test_the_layers_of_a_unet_account_for_its_time_and_arithmetic(small):
    size = torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 32)
    table = layer_profile(small.unet, *size)
    assert set(table.kind) == {"convolution 3x3", "convolution 1x1", "linear", "norm", "attention", "rest"}
    products = table[~table.kind.isin(["norm", "rest"])]
    assert products.flops.sum() == 2 * macs(small.unet, *size)
    assert len(table) == len(set(table.name)) and (table[table.kind != "rest"].bytes > 0).all()
    first = table[table.name == "input_blocks.0.0"].iloc[0]
    assert first.block == "input_blocks.0"
    assert first.bytes == 4 * (2 * 4 * 256 + 2 * 16 * 256 + 16 * 4 * 9)
    assert table.seconds.sum() > 0 and not any(m._forward_hooks for m in small.unet.modules())


def test_packed_layers_do_the_same_arithmetic_and_move_fewer_bytes(small):
    size = torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 32)
    plain = layer_profile(small.unet, *size, repeats=1).set_index("name")
    model = to_packed(QuantModel(small.unet, weight_quant_params={"n_bits": 4}, act_quant_params=None))
    packed = layer_profile(model, *size, repeats=1)
    packed = packed.set_index(packed.name.str.removeprefix("module."))
    assert packed.flops.to_dict() == plain.flops.to_dict()
    for name, layer in small.unet.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and len(layer.weight) % 2 == 0:
            saved = 4 * layer.weight.numel() - layer.weight.numel() // 2
            assert plain.bytes[name] - packed.bytes[name] == saved, name


def test_the_time_of_a_layer_is_the_time_between_its_marks(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks) ** 2)))
    table = layer_profile(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(1, 4), repeats=3
    )
    # Each repeat reads the clock 6 times: at its begin, twice for the first layer, twice for the last, and at
    # its end. Times grow, so the second of three repeats, with readings 6 to 11, is the median.
    assert dict(zip(table.name, table.seconds, strict=True)) == {
        "0": 8**2 - 7**2,
        "2": 10**2 - 9**2,
        "": 11**2 - 6**2 - (8**2 - 7**2) - (10**2 - 9**2),
    }
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        layer_profile(nn.Linear(4, 4), torch.ones(1, 4), repeats=0)


def test_a_model_that_fails_keeps_no_clock(small, monkeypatch):
    def broken(*_, **__):
        raise NonFiniteError("step 1 of 2 gives values that are not finite")

    monkeypatch.setattr(type(small), "generate", broken)
    with pytest.raises(NonFiniteError):
        component_times({"a": small}, ["a star"], repeats=1)
    with pytest.raises(RuntimeError):
        layer_profile(small.unet, torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 31))
    parts = (small.unet, small.text_encoder, small.decoder)
    left = [m for part in parts for m in part.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not left


def test_components_add_up_to_less_than_the_whole(small):
    table = component_times({"a": small, "b": small}, ["a star"], repeats=2, steps=2, batch_size=1)
    assert list(table.variant) == ["a", "b", "a", "b"]
    parts = table[["text encoder", "UNet", "decoder"]]
    assert (parts > 0).all(axis=None) and (parts.sum(axis=1) < table.total).all()


def test_a_machine_has_peaks(monkeypatch):
    peaks = machine_peaks(repeats=1, n=128)
    assert {"fp32", "memory"} <= peaks.keys() and min(peaks.values()) > 0.1
    assert ("bf16" in peaks) == computes_bfloat16()
    monkeypatch.setattr("sdcomp.evaluation.profile.computes_bfloat16", lambda: False)
    assert machine_peaks(repeats=1, n=128).keys() == peaks.keys() - {"bf16"}
