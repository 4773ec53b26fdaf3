"""How quantized models run: kernels or dequantized weights, devices, types, NaN, inference mode, tracing."""

import copy

import pytest
import torch
from quantized_models import (
    Layers,
    build,
    calibrate,
    decibels,
    needs_kernels,
    quant_model,
    random,
    small_call,
    timestep_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sdcomp
from sdcomp.errors import UserError
from sdcomp.integer import int8_kernels, load_int8, save_int8, to_int8
from sdcomp.integer.execution import choose_execution
from sdcomp.model.offloading import weights_on
from sdcomp.model.unet import ResBlock
from sdcomp.quantization import (
    QuantModel,
)

PROMPT = "a small red star"
EXECUTIONS = [pytest.param("kernels", marks=needs_kernels), "dequantized"]


@pytest.fixture(scope="module")
def q(small):
    """A calibrated simulation with two intervals."""
    model = timestep_model(small.unet, k=2)
    return calibrate(model, small_call(small), small_call(small, 1, 100))


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(int8_kernels, "missing", lambda _: "PyTorch 1 has no integer operators")


# The choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "meta"])
@pytest.mark.parametrize("there", [True, False])
def test_kernels_need_a_cpu_that_has_them_and_a_type_that_they_take(monkeypatch, device, dtype, there):
    monkeypatch.setattr(int8_kernels, "missing", lambda _: None if there else "no operators here")
    expected = "kernels" if there and device == "cpu" and dtype != torch.float16 else "dequantized"
    assert choose_execution(device, dtype) == choose_execution(device, dtype, "auto") == expected
    assert choose_execution(device, dtype, "dequantized") == "dequantized"
    if expected == "kernels":
        assert choose_execution(device, dtype, "kernels") == "kernels"
        return
    reason = (
        "no operators here" if dtype != torch.float16 else "compute in float32 or bfloat16, not in float16"
    )
    reason = reason if device == "cpu" else f"run on CPUs only, not on {device}"
    with pytest.raises(UserError, match=f"{reason}; execution='dequantized' runs on any device"):
        choose_execution(device, dtype, "kernels")


def test_other_executions_and_types_are_refused(q):
    with pytest.raises(ValueError, match="execution must be one of auto, kernels, dequantized, not 'fast'"):
        to_int8(q, execution="fast")
    with pytest.raises(ValueError, match=r"dtype must be .*float16, not torch\.float64"):
        to_int8(q, torch.float64, "dequantized")


def test_without_kernels_weights_are_dequantized_which_the_text_says(small, no_kernels):
    call = small_call(small)
    q = calibrate(quant_model(small.unet, split_shortcuts=True), call)
    with pytest.raises(UserError, match="PyTorch 1 has no integer operators; execution='dequantized' runs"):
        to_int8(q, execution="kernels")
    m = to_int8(q)
    assert m.execution == "dequantized" and "dequantized layer by layer" in repr(m)
    assert decibels(m(*call), q(*call)) > 100
    assert m.state_dict()["module.out.2.weight"].dtype is torch.int8


@needs_kernels
@pytest.mark.parametrize("overrides", [{}, {"out": {"weight_quant_params": {"n_bits": 8}}}])
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_a_cpu_without_vnni_multiplies_weights_of_7_bits(small, tmp_path, monkeypatch, bits, overrides):
    def failure(weight_max):
        return "wrong sums" if weight_max > 63 else None

    monkeypatch.setattr(int8_kernels, "_failure", failure)
    q = QuantModel(small.unet, weight_quant_params={"n_bits": bits}, overrides=overrides)
    calibrate(q, small_call(small))
    narrow = bits < 8 and not overrides
    m = to_int8(q)
    loaded = load_int8(save_int8(m, tmp_path))
    assert m.execution == loaded.execution == ("kernels" if narrow else "dequantized")
    assert torch.equal(m(*small_call(small)), loaded(*small_call(small)))
    if narrow:
        assert load_int8(tmp_path, execution="kernels").to(torch.bfloat16).dtype is torch.bfloat16
        return
    for make in (lambda: to_int8(q, execution="kernels"), lambda: load_int8(tmp_path, execution="kernels")):
        with pytest.raises(UserError, match="no VNNI, so .* at most 7 bits in every layer; execution="):
            make()


# Types


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 25), (torch.bfloat16, 12)])
@pytest.mark.parametrize("kind", ["plain", "split", "filters"])
def test_dequantized_models_compute_in_half_precision(small, kind, dtype, least):
    call = small_call(small)
    q = calibrate(build(small.unet, kind), call)
    m = to_int8(q, dtype, "dequantized")
    assert m.dtype is dtype and {p.dtype for p in m.parameters()} == {dtype}
    assert m(*call).dtype is torch.float32
    half = m(call[0].to(dtype), call[1], call[2].to(dtype))
    assert half.dtype is dtype
    assert decibels(m(*call), q(*call)) > least and decibels(half, q(*call)) > least


def test_a_model_in_half_precision_stays_in_it(small, q):
    half = copy.deepcopy(q).to(torch.float16)
    m = to_int8(half)
    assert (m.dtype, m.execution) == (torch.float16, "dequantized")
    call = [x.half() if isinstance(x, torch.Tensor) else x for x in small_call(small)]
    assert m(*call).dtype is torch.float16 and m(*call).isfinite().all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_type_follows_the_whole_model(small, q, tmp_path, execution):
    sd = copy.deepcopy(small).replace(unet=to_int8(q, execution=execution))
    before = sd.generate(PROMPT, steps=2)
    sd.to(torch.bfloat16)
    assert sd.unet.dtype is torch.bfloat16 and "torch.bfloat16" in repr(sd.unet)
    after = sd.generate(PROMPT, steps=2)
    assert 12 < decibels(after, before) < 60
    again = load_int8(save_int8(sd.unet, tmp_path), execution=execution)
    assert repr(again) == repr(sd.unet)
    assert torch.equal(again(*small_call(small)), sd.unet(*small_call(small)))
    sd.to(torch.float32)
    assert sd.generate(PROMPT, steps=2).isfinite().all() and sd.unet.dtype is torch.float32


@needs_kernels
@pytest.mark.parametrize("where", [torch.float16, torch.float64, "meta"])
def test_packed_weights_stay_where_their_kernels_are(small, q, where):
    sd = copy.deepcopy(small).replace(unet=to_int8(q))
    expected = sd.generate(PROMPT, steps=1)
    with pytest.raises(UserError, match="not (in|on) .* load or make it anew with execution='dequantized'"):
        sd.to(where)
    assert torch.equal(sd.generate(PROMPT, steps=1), expected)  # no part has changed
    x, t, context = small_call(small)
    with (
        pytest.raises(UserError, match="CPUs only, not on meta"),
        weights_on(sd.unet, torch.device("meta")),  # as `offload` does
    ):
        sd.unet(x.to("meta"), t, context.to("meta"))


def test_no_type_that_a_file_cannot_have(q):
    with pytest.raises(ValueError, match="dtype must be"):
        to_int8(q, execution="dequantized").to(torch.float64)


# Devices


def test_a_dequantized_model_moves(q):
    m = to_int8(q, execution="dequantized").to("meta")
    assert {t.device.type for t in m.state_dict().values()} == {"meta"}


def test_a_saved_model_is_loaded_where_it_is_wanted(small, q, tmp_path):
    # The meta device stands for CUDA: it has no integer kernels either.
    folder = sdcomp.save(small.replace(unet=to_int8(q)), tmp_path)
    sd = sdcomp.load(folder, device="meta")
    assert sd.unet.execution == "dequantized"
    assert {t.device.type for t in sd.unet.state_dict().values()} == {"meta"}
    with pytest.raises(UserError, match="CPUs only, not on meta"):
        sdcomp.load(folder, device="meta", execution="kernels")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_execution_of_a_saved_model_is_chosen_anew(small, q, tmp_path, execution):
    call = small_call(small)
    folder = sdcomp.save(small.replace(unet=to_int8(q, execution="dequantized")), tmp_path)
    sd = sdcomp.load(folder, execution=execution)
    assert sd.unet.execution == execution
    assert torch.equal(sd.unet(*call), to_int8(q, execution=execution)(*call))
    assert sdcomp.load(folder, dtype=torch.bfloat16).generate(PROMPT, steps=1).isfinite().all()


def test_other_models_have_no_execution_to_choose(small, tmp_path):
    with pytest.raises(UserError, match="holds no int8 model: leave execution='dequantized' out"):
        sdcomp.load(sdcomp.save(small, tmp_path), execution="dequantized")


# NaN


def models(q: QuantModel) -> list:
    ways = ["dequantized"] if int8_kernels.missing(int8_kernels.NARROW) else ["kernels", "dequantized"]
    return [q, *(to_int8(q, execution=way) for way in ways), to_int8(q, torch.bfloat16)]


def test_nan_of_an_input_is_nan_in_its_rows_and_no_others(small, q):
    x, t, context = small_call(small)
    nan = float("nan")
    for m in models(q):
        expected = m(x, t, context)
        latents, text = x.clone(), context.clone()
        latents[1, 2, 3, 4] = text[1, 5, 6] = nan
        for call in ((latents, t, context), (x, t, text)):
            got = m(*call)
            assert got[1].isnan().any(), type(m)
            assert torch.equal(got[[0, 2]], expected[[0, 2]])
        assert m(x, t, text[1:2]).isnan().flatten(1).any(1).all()
        # Infinite values are clipped, as all that is beyond the range.
        latents[1, 2, 3, 4] = float("inf")
        assert m(latents, t, context).isfinite().all()


def test_nan_of_a_timestep(small):
    x, t, context = small_call(small)
    q = calibrate(quant_model(small.unet), (x, t, context))
    for m in models(q):
        assert m(x, torch.tensor(float("nan")), context).isnan().any(), type(m)


@pytest.mark.parametrize(
    "name", ["out.0.weight", "middle_block.0.in_layers.2.bias", "input_blocks.0.0.weight"]
)
def test_integers_do_not_hide_what_is_not_finite(small, name):
    unet = copy.deepcopy(small.unet)
    call = small_call(small)
    q = calibrate(quant_model(unet, quant_filters=["input_blocks.0"]), call)
    with torch.no_grad():
        unet.get_parameter(name).view(-1)[1] = float("inf")
    with pytest.raises(UserError, match=f"^{name} has NaN or infinite values"):
        to_int8(q)


# Rows


@pytest.mark.parametrize("kind", ["plain", "filters"])
def test_one_time_embedding_serves_all_rows(randomize, kind):
    block = randomize(ResBlock(8, 16, 12, 4), 0)
    x, emb = random(3, 8, 6, 6), random(1, 12, seed=1)
    filters = ["emb_layers", "skip_connection"] if kind == "filters" else []
    for m in models(calibrate(quant_model(block, quant_filters=filters), (x, emb))):
        shared = m(x, emb)
        assert torch.equal(shared, m(x, emb.expand(3, -1))), type(m)
        assert torch.equal(shared[1:], m(x[1:], emb))


# Timesteps and tracing


class Operators(TorchDispatchMode):
    """Records the tensor operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_interval_of_a_plain_number_needs_no_tensor(q):
    x = torch.zeros(1)
    for m in (q, to_int8(q, execution="dequantized")):
        with Operators() as operators:
            for t, interval in ((0, 0), (499, 0), (500, 1), (999.0, 1)):
                m._enter((x, t, x), {})
                assert (m.state.interval, m.state.timestep) == (interval, t)
        assert operators.seen == []
        for t in (torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 999.0]), [500, 501]):
            m._enter((x, t, x), {})
            assert (m.state.interval, m.state.timestep) == (1, 500)


@pytest.mark.parametrize("called_before", [True, False])
def test_models_can_be_exported(randomize, called_before):
    q = timestep_model(randomize(Layers(), 0), k=2, split_shortcuts=True)
    x = random(2, 6, 5, 5)
    calibrate(q, (0.5 * x, 100), (x, 900))
    for m in (q, to_int8(q, execution="dequantized")):
        for t in (100, 900):
            expected = (m if called_before else copy.deepcopy(m))(x, t)
            program = torch.export.export(m, (x, t), strict=False)
            assert torch.equal(program.module()(x, t), expected)
            assert torch.equal(m(x, t), expected)  # nothing of the tracer stays


# Inference mode


def test_a_caller_in_inference_mode_gets_the_same(small, q):
    call = small_call(small)
    with torch.inference_mode():
        inside = [m(*call) for m in models(copy.deepcopy(q))]
        made = quant_model(small.unet)
    for a, m in zip(inside, models(q), strict=True):
        assert torch.equal(a, m(*call))
    # What is made inside can be changed outside.
    calibrate(made, call)
    outside = calibrate(quant_model(small.unet), call)
    assert torch.equal(made(*call), outside(*call))


def test_calibrating_in_inference_mode_gives_the_same_scales(small):
    found = []
    for mode in (torch.inference_mode, torch.no_grad):
        q = quant_model(small.unet)
        with mode():
            sdcomp.Calibrator(small, q, quantized_inputs=True).calibrate([PROMPT], steps=2)
        found.append([layer.act_scale for layer in q.quantized_layers()])
    assert all(map(torch.equal, *found))


def test_a_rounded_weight_made_in_inference_mode_is_a_normal_tensor():
    q = QuantModel(nn.Linear(4, 3), act_quant_params=None)
    with torch.inference_mode():
        q(torch.eye(4))
    assert not q.quantized_layers()[0].fake_weight().is_inference()


def test_weights_made_in_inference_mode_are_rounded_anew():
    with torch.inference_mode():
        module = nn.Linear(4, 3, bias=False)
        q = QuantModel(module, act_quant_params=None)
        before = q(torch.eye(4))
        module.weight[0] = 0  # counted by nobody
        after = q(torch.eye(4))
    assert before[:, 0].any() and not after[:, 0].any()
