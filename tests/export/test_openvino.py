"""Exported OpenVINO models beside the simulation that they were made of."""

import sys
import warnings

import pytest
import torch
from quantized_models import WEIGHT_BITS, calibrate, decibels, quant_model, random, timestep_model
from torch import nn

import sdcomp
from sdcomp.evaluation import weight_bytes
from sdcomp.export import load_openvino
from sdcomp.export.graph import GraphAttentionScores, GraphLayer, Interval
from sdcomp.export.openvino import OpenVINODialect
from sdcomp.integer import int8_kernels
from sdcomp.model.unet import GEGLU
from sdcomp.quantization import NotCalibratedError, QuantModel, build
from sdcomp.quantization.attention import QuantAttentionScores
from sdcomp.quantization.shared_state import QuantState

openvino = pytest.importorskip("openvino")

EIGHT = {"n_bits": 8}
WIDEST = {"n_bits": WEIGHT_BITS}
LAYERS = {
    "8 bits": (WIDEST, EIGHT),
    "affine inputs": (WIDEST, {"n_bits": 8, "symmetric": False}),
    "6 bits": (WIDEST, {"n_bits": 6}),
    "4 bits, affine inputs": ({"n_bits": 4}, {"n_bits": 4, "symmetric": False}),
    "weights in groups": ({"n_bits": 4, "granularity": "group", "group_size": 9}, None),
    "affine weights": ({"n_bits": 4, "symmetric": False}, EIGHT),
    "affine weights of 8 bits": ({"n_bits": 8, "symmetric": False}, EIGHT),
    "inputs only": (None, EIGHT),
}


def ranges(q: QuantModel, x: torch.Tensor) -> QuantModel:
    """Calibrated so that the largest values of `x` are clipped."""
    for layer in q.quantized_layers():
        if layer.act_scale is not None:
            grid = layer.act_quantizer.grid_of_range(x.min() * 0.8, x.max() * 0.8)
            layer.set_act_scales(grid.scale[None], torch.zeros(1), zero_points=grid.zero_point)
    q.is_calibrated.fill_(True)
    return q


@pytest.mark.parametrize("make", [nn.Conv2d, nn.Linear], ids=["convolution", "linear"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_what_its_simulation_does(kind, make):
    weights, inputs = LAYERS[kind]
    torch.manual_seed(0)
    layer = make(4, 32, 3, padding=1, stride=2) if make is nn.Conv2d else make(36, 32)
    x = nn.functional.silu(3 * (random(2, 4, 8, 8) if make is nn.Conv2d else random(2, 5, 36)))
    q = QuantModel(nn.Sequential(layer), weight_quant_params=weights, act_quant_params=inputs)
    ranges(q, x)
    graph = GraphLayer(q.quantized_layers()[0], OpenVINODialect(), Interval()).eval()
    model = openvino.convert_model(graph, example_input=x, input=[openvino.PartialShape(x.shape)])
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = q(x)
    found = torch.from_numpy(compiled(x.numpy())[0])
    # Symmetric grids of 8 bits reach -128 there; SiLU's outputs do not reach so far down.
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("n_bits", "precision", "margin"), [(4, "f32", 20), (WEIGHT_BITS, "f32", 20), (4, "bf16", 10)]
)
def test_attention_scores_are_products_of_integers(n_bits, precision, margin):
    call = random(2, 3, 40, 16), random(2, 3, 40, 16, seed=1), random(2, 3, 40, 16, seed=2)
    call[1][1, 2] = 0
    graph = GraphAttentionScores(n_bits, OpenVINODialect()).eval()
    shapes = [openvino.PartialShape([-1, 3, -1, 16])] * 3
    model = openvino.convert_model(graph, example_input=call, input=shapes)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    found = torch.from_numpy(compiled([x.numpy() for x in call])[0])
    expected = QuantAttentionScores(n_bits, QuantState())(*call)
    plain = nn.functional.scaled_dot_product_attention(*call)
    assert decibels(expected, found) > decibels(expected, plain) + margin
    info = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = {(part["layerType"].value, part["runtimePrecision"].value) for part in info}
    assert kinds & {("Subgraph", "i8"), ("MatMul", "i8")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With more, our float layers may have the simulation's bits; the engine's never have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained():
    return sdcomp.load("data/tiny")


@pytest.fixture(scope="module")
def calls(trained):
    """Calls at two timesteps of different intervals, with an odd number of rows and an odd shape."""
    context = trained.encode_prompts(["a small red star on a navy background"] * 3)
    return [(random(3, 4, 16, 24, seed=t), t, context) for t in (100, 300, 600, 900)]


@pytest.fixture(scope="module")
def simulated(trained, calls):
    return calibrate(timestep_model(trained.unet, k=2), *calls)


@pytest.fixture(scope="module")
def exported(trained, simulated, tmp_path_factory):
    file = tmp_path_factory.mktemp("tiny") / "unet.xml"
    return load_openvino(sdcomp.export(trained.replace(unet=simulated), file, format="openvino"))


def test_it_is_nearly_as_close_to_the_simulation_as_our_kernels_are(simulated, exported, calls):
    int8 = sdcomp.to_int8(simulated)
    with torch.no_grad():
        expected = [simulated(*call) for call in calls]
        ours, theirs = (
            sum(decibels(want, unet(*call)) for want, call in zip(expected, calls, strict=True)) / len(calls)
            for unet in (int8, exported)
        )
    assert theirs > ours - 3


def test_every_layer_runs_in_integers_at_all_timesteps(simulated, exported):
    kinds = [op.get_rt_info() for op in exported._compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].value, info["runtimePrecision"].value) for info in kinds]
    products = [precision for kind, precision in kinds if kind in ("Convolution", "FullyConnected")]
    # The two halves of a GEGLU are a product each.
    layers = len(simulated.quantized_layers()) + sum(isinstance(m, GEGLU) for m in simulated.modules())
    assert len(products) == layers and set(products) == {"i8", "u8"}


def test_the_file_has_bytes_for_weights(trained, exported):
    weights = sum(p.numel() for p in trained.unet.parameters())
    assert weights < exported.weights.numel() < 1.05 * weights
    assert weight_bytes(exported) == exported.file.with_suffix(".bin").stat().st_size


def test_it_generates_images_in_our_pipeline(trained, simulated, exported):
    prompts = ["a small red star on a navy background", "a large blue ring on a teal background"]
    images = [trained.replace(unet=unet).generate(prompts, steps=4, seed=1) for unet in (simulated, exported)]
    assert images[1].shape == (2, 3, 64, 64)
    assert (images[0] - images[1]).abs().mean() < 0.01 < images[0].std()


def test_rows_share_one_timestep(exported, calls):
    latents, timestep, context = calls[0]
    same = exported(latents, torch.full((3,), timestep), context)
    torch.testing.assert_close(same, exported(latents, timestep, context))
    with pytest.raises(ValueError, match="one timestep for all rows"):
        exported(latents, torch.tensor([1, 1, 2]), context)


def test_other_types_of_inputs_are_converted(exported, calls):
    latents, timestep, context = calls[0]
    out = exported(latents.bfloat16(), timestep, context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert decibels(exported(latents, timestep, context), out.float()) > 20


def test_a_unet_with_rounded_weights_alone(small, tmp_path):
    q = build("weights_gptq_groups", small.unet, weight_bits=4)  # the method itself is not applied
    unet = load_openvino(sdcomp.export(small.replace(unet=q), tmp_path / "a.xml", format="openvino"))
    call = (random(2, 4, 16, 16), 500, random(2, 24, 32))
    with torch.no_grad():
        torch.testing.assert_close(unet(*call), q(*call), atol=1e-3, rtol=1e-3)


def test_a_unet_with_quantized_attention_scores(trained, calls, tmp_path):
    params = {"act_quant_params": WIDEST}  # these are the bits of queries and keys, too
    q = calibrate(quant_model(trained.unet, quantize_attention_products="scores", **params), *calls)
    plain = calibrate(quant_model(trained.unet, **params), *calls)
    exported = [
        load_openvino(sdcomp.export(trained.replace(unet=unet), tmp_path / name, format="openvino"))
        for name, unet in (("a.xml", q), ("b.xml", plain))
    ]
    with torch.no_grad():
        found, without = ([decibels(q(*call), unet(*call)) for call in calls] for unet in exported)
        alike = [decibels(plain(*call), exported[1](*call)) for call in calls]
    assert sum(found) > sum(alike) - 3 * len(calls)
    assert sum(found) > sum(without)


def test_what_cannot_be_exported_is_refused(small, tmp_path):
    def refuse(unet, error, message, name="a.xml", **options):
        with pytest.raises(error, match=message):
            sdcomp.export(small.replace(unet=unet), tmp_path / name, format="openvino", **options)
        assert not list(tmp_path.iterdir())

    tokens = QuantModel(small.unet, act_quant_params={"n_bits": 8, "granularity": "token"})
    refuse(tokens, ValueError, "a scale for each token")
    refuse(QuantModel(small.unet), NotCalibratedError, "calibrate the model first")
    refuse(nn.Linear(1, 1), sdcomp.ModelError, "not a Linear")
    refuse(small.unet, sdcomp.ModelError, "ends in .xml", name="a.bin")
    refuse(small.unet, ValueError, "leave dtype out", dtype=torch.float16)


def test_files_that_are_missing_or_damaged_are_refused(tmp_path):
    with pytest.raises(sdcomp.ModelError, match="is missing"):
        load_openvino(tmp_path / "a.xml")
    (tmp_path / "a.xml").write_text("<net/>")
    (tmp_path / "a.bin").write_bytes(b"12")
    with pytest.raises(sdcomp.ModelError, match="OpenVINO cannot load"):
        load_openvino(tmp_path / "a.xml")


@pytest.mark.parametrize("bits", [7, 8])
def test_a_cpu_without_vnni_is_warned_of_weights_of_8_bits(small, tmp_path, monkeypatch, bits):
    monkeypatch.setattr(int8_kernels, "_failure", lambda weight_max: "wrong" if weight_max > 63 else None)
    call = (random(2, 4, 16, 16), 500, random(2, 24, 32))
    weights = {"n_bits": bits}
    alone = QuantModel(small.unet, weight_quant_params=weights, act_quant_params=None)
    both = calibrate(QuantModel(small.unet, weight_quant_params=weights), call)
    files = [
        sdcomp.export(small.replace(unet=unet), tmp_path / name, format="openvino")
        for name, unet in (("alone.xml", alone), ("both.xml", both))
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for file in files:
            load_openvino(file)
    found = [str(warning.message) for warning in caught if "VNNI" in str(warning.message)]
    assert len(found) == (bits == 8)
    assert all("both.xml has weights of 8 bits" in text for text in found)


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[deploy\]'"):
        sdcomp.export(small, tmp_path / "a.xml", format="openvino")


def test_bfloat16_between_the_integers_changes_little(exported, calls):
    in_bfloat16 = load_openvino(exported.file, torch.bfloat16)
    for call in calls:
        assert decibels(exported(*call), in_bfloat16(*call)) > 20
    with pytest.raises(ValueError, match="float32 or torch.bfloat16, not torch.float16"):
        load_openvino(exported.file, torch.float16)


def test_the_text_tells_models_with_other_results_apart(tmp_path):
    def saved(layer, name):
        model = openvino.convert_model(layer.eval(), example_input=torch.ones(1, 4))
        openvino.save_model(model, tmp_path / name, compress_to_fp16=False)
        return tmp_path / name

    # GELU and its approximation have no weights.
    linear, file = nn.Linear(4, 4), tmp_path / "a.xml"
    first = repr(load_openvino(saved(nn.Sequential(linear, nn.GELU()), "a.xml")))
    text = file.read_bytes()
    assert repr(load_openvino(file, torch.bfloat16)) != first
    assert repr(load_openvino(saved(nn.Sequential(linear, nn.GELU("tanh")), "a.xml"))) != first
    # Once more the same: constants have other names then.
    assert repr(load_openvino(saved(nn.Sequential(linear, nn.GELU()), "a.xml"))) == first
    assert file.read_bytes() != text
