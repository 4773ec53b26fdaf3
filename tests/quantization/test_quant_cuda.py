"""Quantized models on a CUDA device: calibrated, saved, offloaded, in half precision."""

import copy

import pytest
import torch
from quantized_models import Layers, calibrate, decibels, random

import sdcomp
from sdcomp.errors import UserError
from sdcomp.integer import int8_kernels, to_int8
from sdcomp.model import StableDiffusion
from sdcomp.quantization import (
    Calibrator,
    QuantModel,
    TimeStepCalibratedQuantModel,
    fake_quantize,
    load_quant_model,
    quantize,
    save_quant_model,
)

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
PROMPTS = ["a small red star on a navy background", "a large blue circle"]
SETTINGS = {"steps": 4, "seed": 3, "batch_size": 2}
BITS = {"weight_quant_params": {"n_bits": 8}, "act_quant_params": {"n_bits": 8}}


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return sdcomp.load("data/tiny", device=DEVICE)


@pytest.fixture(scope="module")
def q(tiny) -> QuantModel:
    """A simulation, calibrated on the device."""
    model = TimeStepCalibratedQuantModel(tiny.unet, timesteps=4, k=2, quant_filters=["time_embed"])
    return Calibrator(tiny, model).calibrate(PROMPTS, steps=4)


def call(sd: StableDiffusion, dtype: torch.dtype = torch.float32) -> tuple:
    text = sd.config.text["max_position_embeddings"], sd.config.unet.context_dim
    return random(2, 4, 16, 16).to(DEVICE, dtype), 600, random(2, *text, seed=1).to(DEVICE, dtype)


def devices(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


def test_rounding_is_that_of_the_cpu_and_of_pytorchs_operator():
    x = 3 * random(4, 24, 16, 16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for qmax in (1, 7, 127):
            made = fake_quantize(x.to(DEVICE, dtype), 0.031, qmax)
            assert torch.equal(made.cpu(), fake_quantize(x.to(dtype), 0.031, qmax))
            if dtype != torch.bfloat16:
                scale = torch.tensor(0.031).item()
                made = fake_quantize(x.to(DEVICE, dtype), scale, qmax)
                theirs = torch.fake_quantize_per_tensor_affine(x.to(DEVICE, dtype), scale, 0, -qmax, qmax)
                assert torch.equal(made, theirs)


def test_nan_stays_nan():
    x = torch.tensor([float("nan"), float("inf"), 0.3], device=DEVICE)
    made = fake_quantize(x, 0.25, 7)
    assert made[0].isnan() and made[1:].tolist() == [1.75, 0.25]


def test_nan_of_an_input_is_nan_in_its_rows(tiny, q):
    x, t, context = call(tiny)
    x[1, 0, 2, 3] = float("nan")
    for m in (q, to_int8(q)):
        rows = m(x, t, context).isnan().flatten(1).any(1)
        assert rows.tolist() == [False, True]


def test_scales_found_on_the_device_are_those_found_on_the_cpu(q):
    cpu = sdcomp.load("data/tiny")
    model = TimeStepCalibratedQuantModel(cpu.unet, timesteps=4, k=2, quant_filters=["time_embed"])
    Calibrator(cpu, model).calibrate(PROMPTS, steps=4)
    for here, there in zip(q.quantized_layers(), model.quantized_layers(), strict=True):
        assert here.act_scale.device.type == DEVICE
        # Kernels differ by TF32's rounding at most, which four steps carry on.
        assert torch.allclose(here.act_scale.cpu(), there.act_scale, rtol=0.05)
        assert torch.equal(here.integer_weight().cpu(), there.integer_weight())


def test_int8_weights_are_dequantized_there(tiny, q):
    m = to_int8(q)
    assert (m.execution, devices(m)) == ("dequantized", {DEVICE})
    assert m.state_dict()["module.out.2.weight"].dtype is torch.int8
    assert decibels(m(*call(tiny)), q(*call(tiny))) > 30
    images = tiny.replace(unet=m).generate(PROMPTS, **SETTINGS)
    assert decibels(images, tiny.generate(PROMPTS, **SETTINGS)) > 15
    with pytest.raises(UserError, match="the int8 kernels run on CPUs only, not on cuda"):
        to_int8(q, execution="kernels")


@pytest.mark.parametrize("how", ["int8", "quantized"])
def test_a_saved_model_is_the_same_there(tiny, q, tmp_path, how):
    unet = to_int8(q) if how == "int8" else q
    sd = tiny.replace(unet=unet)
    again = sdcomp.load(sdcomp.save(sd, tmp_path), device=DEVICE)
    assert type(again.unet) is type(unet) and devices(again.unet.module) == {DEVICE}
    assert torch.equal(again.unet(*call(tiny)), unet(*call(tiny)))
    assert decibels(again.generate(PROMPTS, **SETTINGS), sd.generate(PROMPTS, **SETTINGS)) > 60


def test_a_model_saved_on_a_cpu_runs_there_and_the_other_way_round(tiny, q, tmp_path):
    cpu = sdcomp.load("data/tiny")
    on_cpu = load_quant_model(save_quant_model(q, tmp_path / "scales"), cpu.unet)
    folder = sdcomp.save(cpu.replace(unet=to_int8(on_cpu)), tmp_path / "model")
    there = sdcomp.load(folder, device=DEVICE)
    assert decibels(there.unet(*call(tiny)), q(*call(tiny))) > 25
    back = sdcomp.load(sdcomp.save(there, tmp_path / "back"))
    assert back.unet.execution == to_int8(on_cpu).execution
    x, t, context = call(tiny)
    assert torch.equal(back.unet(x.cpu(), t, context.cpu()), to_int8(on_cpu)(x.cpu(), t, context.cpu()))


@pytest.mark.parametrize("preset", ["low_bits", "low_rank"])
def test_rounded_weights_and_branches_are_loaded_there(tiny, tmp_path, preset):
    unet = quantize(tiny, preset, PROMPTS, weight_bits=4, steps=2, batch_size=2)
    sd = sdcomp.load(sdcomp.save(tiny.replace(unet=unet), tmp_path), device=DEVICE)
    for loaded in (sd.unet, load_quant_model(tmp_path, tiny.unet)):
        assert devices(loaded.module) == {DEVICE}
        assert torch.equal(loaded(*call(tiny)), unet(*call(tiny)))


@pytest.mark.skipif(int8_kernels.missing() is not None, reason=str(int8_kernels.missing()))
def test_packed_weights_do_not_move_and_dequantized_ones_do(q):
    cpu = copy.deepcopy(q).to("cpu")
    with pytest.raises(UserError, match="not on cuda.* load or make it anew with execution='dequantized'"):
        to_int8(cpu).to(DEVICE)
    assert devices(to_int8(cpu, execution="dequantized").to(DEVICE)) == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(q, tiny, dtype):
    sd = sdcomp.load("data/tiny", device=DEVICE, dtype=dtype)
    sd = sd.replace(unet=copy.deepcopy(q).to(dtype))
    expected = q(*call(tiny))
    int8 = to_int8(sd.unet)
    assert int8.dtype is dtype
    for unet in (sd.unet, int8, to_int8(q).to(dtype)):
        made = unet(*call(tiny, dtype))
        assert made.dtype is dtype and decibels(made, expected) > 12
        assert sd.replace(unet=unet).generate(PROMPTS, **SETTINGS).isfinite().all()


def test_offloading_leaves_nothing_on_the_device(q):
    sd = sdcomp.load("data/tiny")
    sd = sd.replace(unet=copy.deepcopy(q).to("cpu")).offload(DEVICE)
    sd.generate(PROMPTS, **SETTINGS)  # what libraries keep for themselves
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    images = sd.generate(PROMPTS, **SETTINGS)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert devices(sd.unet) == {"cpu"}
    with torch.no_grad():
        sd.unet.module.out[2].weight.mul_(0.5)
    assert not torch.equal(sd.generate(PROMPTS, **SETTINGS), images)
    if int8_kernels.missing() is None:
        with pytest.raises(UserError, match="CPUs only, not on cuda"):
            sd.replace(unet=to_int8(sd.unet)).generate(PROMPTS, **SETTINGS)
    unet = to_int8(sd.unet, execution="dequantized")
    assert sd.replace(unet=unet).generate(PROMPTS, **SETTINGS).isfinite().all()


def test_a_call_with_a_plain_timestep_waits_for_nothing(randomize):
    x = random(2, 6, 5, 5)
    model = TimeStepCalibratedQuantModel(randomize(Layers(), 0), k=2, split_shortcuts=True)
    model = calibrate(model, (x, 100), (x, 900)).to(DEVICE)
    x = x.to(DEVICE)
    for m in (model, model.to_int8()):
        m(x, 900)
        torch.cuda.set_sync_debug_mode("error")
        try:
            m(x, 100)
        finally:
            torch.cuda.set_sync_debug_mode("default")
