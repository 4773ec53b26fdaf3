"""Bytes of compressed UNets, by hand and against files that are really written."""

import pytest
import torch
from torch import nn

import sdcomp
from sdcomp.integer import save_int8, to_int8, to_packed
from sdcomp.pruning import disk_sizes, prune_structured, prune_unstructured
from sdcomp.quantization import Calibrator, QuantModel
from sdcomp.study import FP32, pruned
from sdcomp.study.sizes import packed_bytes, packed_file_bytes, share_gone, stored_bytes


def layer(*weights):
    module = nn.Linear(len(weights), 1, bias=False)
    module.weight.data[:] = torch.tensor(weights)
    return module


def test_what_is_gone_was_removed_or_set_to_zero():
    masked, removed = pruned("masked channels", 0.1), pruned("removed", 0.1)

    def rows(*values):
        return [{"variant": v, "value": x} for v, x in zip((FP32, masked, removed), values, strict=True)]

    # 8 of 10 million are not zero at first; then 6 of 10, and 4 of 5.
    gone = share_gone(rows(10, 10, 5), rows(20, 40, 20))
    assert gone == pytest.approx({FP32: 0, masked: 25, removed: 50})


def test_packed_bytes_by_hand():
    assert packed_bytes(layer(*[1.0] * 16)) == 64
    # 12 of 16 zero: 16 bits that say where, and 4 float32.
    assert packed_bytes(layer(*[0.0] * 12, *[1.0] * 4)) == 2 + 16
    # 4 bits each; beside them a scale (4 bytes), a flag, and the interval's start, whose zero takes a bit.
    model = QuantModel(layer(*[1.0] * 16), weight_quant_params={"n_bits": 4}, act_quant_params=None)
    assert packed_bytes(model) == 8 + 4 + 1 + 1
    sparse = layer(*[0.0] * 12, *[1.0] * 4)
    model = QuantModel(sparse, weight_quant_params={"n_bits": 4}, act_quant_params=None)
    assert packed_bytes(model) == 2 + 2 + 4 + 1 + 1


def test_each_layer_counts_its_own_bits_and_rounded_weights_count_once():
    module = nn.Sequential(layer(*[1.0] * 16), layer(*[1.0] * 16))
    four = {"weight_quant_params": {"n_bits": 4}, "act_quant_params": None}
    q = QuantModel(module, overrides={"1": {"weight_quant_params": {"n_bits": 8}}}, **four)
    both = 8 + 16 + 2 * 4 + 1 + 1
    assert packed_bytes(q) == both
    q.quantized_layers()[0].set_rounded(q.quantized_layers()[0].fake_weight())
    assert packed_bytes(q) == both


def test_only_what_is_written_counts_as_a_file(small):
    dense = disk_sizes(small.unet)["dense"]
    assert stored_bytes(small.unet) == (dense, True)
    size, real = stored_bytes(prune_structured(small.unet, 0.5, mode="remove"))
    assert real and size < 0.8 * dense
    size, real = stored_bytes(prune_unstructured(small.unet, 0.5))
    assert not real and 0.5 * dense < size < 0.8 * dense
    simulated = QuantModel(small.unet)
    Calibrator(small, simulated).calibrate(["a star"], steps=2, batch_size=1)
    size, real = stored_bytes(simulated)
    assert real and size == packed_file_bytes(simulated) < 0.5 * dense
    assert not stored_bytes(QuantModel(small.unet))[1]  # without scales of inputs nothing runs
    unrounded = QuantModel(small.unet, weight_quant_params=None).set_use_quant(activations=False)
    assert stored_bytes(unrounded)[0] > 0.9 * dense


def test_an_int8_model_takes_its_file(small, tmp_path):
    simulated = QuantModel(prune_unstructured(small.unet, 0.5))
    Calibrator(small, simulated).calibrate(["a star"], steps=2, batch_size=1)
    int8 = to_int8(simulated)
    size, real = stored_bytes(int8)
    assert real and size == (save_int8(int8, tmp_path) / "int8.safetensors").stat().st_size


def test_an_exported_model_takes_its_file(small, tmp_path):
    pytest.importorskip("openvino")
    weights = QuantModel(small.unet, act_quant_params=None)
    file = sdcomp.export(small.replace(unet=weights), tmp_path / "unet.xml", format="openvino")
    size = file.with_suffix(".bin").stat().st_size
    assert stored_bytes(sdcomp.export.load_openvino(file)) == (size, True)


def test_packed_files_leave_zeros_out(small, tmp_path):
    four = {"weight_quant_params": {"n_bits": 4}, "act_quant_params": None}
    sparse = QuantModel(prune_unstructured(small.unet, 0.7), **four)
    sdcomp.save(small.replace(unet=sparse), tmp_path, format="packed")
    written = (tmp_path / "packed.safetensors").stat().st_size
    for unet in (sparse, to_packed(sparse)):
        assert stored_bytes(unet) == (written, True)
    assert written < 0.8 * stored_bytes(QuantModel(small.unet, **four))[0]
    # The names of the tensors stand beside them.
    assert packed_bytes(sparse) < written


def test_a_packed_file_has_the_bits_of_its_weights(small, tmp_path):
    simulated = QuantModel(small.unet, weight_quant_params={"n_bits": 3}, act_quant_params=None)
    sdcomp.save(small.replace(unet=simulated), tmp_path, format="packed")
    assert packed_file_bytes(simulated) == (tmp_path / "packed.safetensors").stat().st_size
    more = QuantModel(small.unet, weight_quant_params={"n_bits": 8}, act_quant_params=None)
    weights = sum(layer.weight.numel() for layer in simulated.quantized_layers())
    saved = packed_file_bytes(more) - packed_file_bytes(simulated)
    assert saved == pytest.approx(weights * 5 / 8, rel=0.02)
