"""Exported ONNX models, run by ONNX Runtime beside the simulation that they were made of."""

import numpy as np
import pytest
import torch
from quantized_models import calibrate, decibels, random
from torch import nn

import sdcomp
from sdcomp.export.graph import GraphAttentionScores, GraphLayer, Interval
from sdcomp.export.onnx import OPSET, ONNXDialect
from sdcomp.model.attention import AttentionProduct
from sdcomp.model.unet import GEGLU
from sdcomp.quantization import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.attention import QuantAttentionScores
from sdcomp.quantization.shared_state import QuantState

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(file, latents, timestep, context) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file)
    names = [i.name for i in session.get_inputs()]
    arrays = (latents.numpy(), np.array([timestep], np.float32), context.numpy())
    return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_computes_what_its_simulation_does(bits, symmetric, tmp_path):
    torch.manual_seed(0)
    x = nn.functional.silu(3 * random(2, 4, 8, 8))
    inputs = {"n_bits": bits, "symmetric": symmetric}
    q = QuantModel(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2)), act_quant_params=inputs)
    layer = q.quantized_layers()[0]
    grid = layer.act_quantizer.grid_of_range(x.min() * 0.8, x.max() * 0.8)  # the largest are clipped
    layer.set_act_scales(grid.scale[None], torch.zeros(1), zero_points=grid.zero_point)
    q.is_calibrated.fill_(True)
    graph = torch.export.export(GraphLayer(layer, ONNXDialect(), Interval()).eval(), (x,))
    torch.onnx.export(graph, f=tmp_path / "a.onnx", opset_version=OPSET, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, q(x), atol=1e-4, rtol=1e-4)


def test_a_unet_with_rounded_weights_alone_varies_in_size(small, tmp_path):
    weights = {"n_bits": 4, "granularity": "group", "group_size": 16}
    q = QuantModel(small.unet, weight_quant_params=weights, act_quant_params=None)
    file = sdcomp.export(small.replace(unet=q), tmp_path / "a.onnx", format="onnx")
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert not any(node.metadata_props for node in model.graph.node)  # no paths of this machine
    integers = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8]
    # 36 columns are no multiple of 16; the two halves of a GEGLU have a weight each.
    assert len(integers) == len(q.quantized_layers()) - 1 + sum(
        isinstance(part, GEGLU) for part in small.unet.modules()
    )
    for shape, length in (((2, 4, 16, 16), 24), ((1, 4, 8, 24), 7)):
        call = random(*shape), 500, random(shape[0], length, 32)
        with torch.no_grad():
            torch.testing.assert_close(run(file, *call), q(*call), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_attention_scores_compute_what_their_simulation_does(n_bits, tmp_path):
    call = tuple(random(2, 3, 40, 16, seed=seed) for seed in range(3))
    call[1][1, 2] = 0
    graph = torch.export.export(GraphAttentionScores(n_bits, ONNXDialect()).eval(), call)
    torch.onnx.export(graph, f=tmp_path / "a.onnx", opset_version=OPSET, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), call, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    expected = QuantAttentionScores(n_bits, QuantState())(*call)
    plain = nn.functional.scaled_dot_product_attention(*call)
    assert decibels(expected, found) > decibels(expected, plain) + 20


def test_every_attention_of_a_unet_rounds_queries_and_keys(small, tmp_path):
    call = random(2, 4, 16, 16), 100, random(2, 5, 32)
    q = calibrate(QuantModel(small.unet, quantize_attention_products="scores"), call)
    file = sdcomp.export(small.replace(unet=q), tmp_path / "a.onnx", format="onnx")
    rounds = [node for node in onnx.load(file).graph.node if node.op_type == "Round"]
    assert len(rounds) == 2 * sum(isinstance(part, AttentionProduct) for part in small.unet.modules())


@pytest.mark.slow
def test_the_trained_model_is_nearly_as_close_to_the_simulation_as_our_kernels_are(tmp_path):
    sd = sdcomp.load("data/tiny")
    context = sd.encode_prompts(["a small red star on a navy background"] * 3)
    calls = [(random(3, 4, 16, 16, seed=t), t, context) for t in (100, 300, 600, 900)]
    q = calibrate(TimeStepCalibratedQuantModel(sd.unet, k=2), *calls)
    file = sdcomp.export(sd.replace(unet=q), tmp_path / "a.onnx", format="onnx")
    onnx.checker.check_model(file, full_check=True)
    weights = sum(p.numel() for p in sd.unet.parameters())
    assert weights < file.stat().st_size < 1.1 * weights  # a byte each; then scales, norms and the graph
    int8 = sdcomp.to_int8(q)
    with torch.no_grad():
        wanted = [q(*call) for call in calls]
        ours = sum(decibels(want, int8(*call)) for want, call in zip(wanted, calls, strict=True))
        theirs = sum(decibels(want, run(file, *call)) for want, call in zip(wanted, calls, strict=True))
    assert theirs > ours - 3 * len(calls)


def test_other_names_are_refused(small, tmp_path):
    with pytest.raises(sdcomp.ModelError, match="ends in .onnx"):
        sdcomp.export(small, tmp_path / "a.xml", format="onnx")
    with pytest.raises(ValueError, match="leave dtype out"):
        sdcomp.export(small, tmp_path / "a.onnx", format="onnx", dtype=torch.float16)
