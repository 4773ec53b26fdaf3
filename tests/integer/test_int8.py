"""Integer execution against its simulation, against exact arithmetic, and its files."""

import copy
import json
from functools import partial
from statistics import median

import pytest
import torch
from quantized_models import (
    WEIGHT_BITS,
    build,
    calibrate,
    decibels,
    needs_kernels,
    quant_model,
    random,
    small_call,
    timestep_model,
)
from safetensors.torch import load, save_file
from torch import nn

from sdcomp.errors import UserError
from sdcomp.integer import int8_kernels, load_int8, save_int8, to_int8
from sdcomp.integer.int8_blocks import _BLOCKS
from sdcomp.integer.int8_layers import Int8Layer
from sdcomp.model import SD15
from sdcomp.model.channel_map import keep_units
from sdcomp.model.prune_groups import PruneGroup
from sdcomp.model.unet import UNet
from sdcomp.pruning import prune_structured
from sdcomp.quantization import (
    NotCalibratedError,
    QuantizationFileError,
)

pytestmark = needs_kernels


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


LAYERS = {
    "3x3": (nn.Conv2d(12, 20, 3, padding=1), (2, 12, 9, 7)),
    "strided": (nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 8, 8)),
    "1x1": (nn.Conv2d(33, 20, 1, bias=False), (3, 33, 5, 5)),
    "dilated": (nn.Conv2d(8, 8, 3, dilation=2, padding=(2, 0)), (1, 8, 9, 9)),
    "grouped": (nn.Conv2d(12, 24, 3, groups=3), (2, 12, 6, 6)),
    "depthwise": (nn.Conv2d(12, 12, 3, groups=12, padding=1), (2, 12, 6, 6)),
    "same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 6, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "linear": (nn.Linear(40, 24), (2, 9, 40)),
    "linear rows": (nn.Linear(7, 5, bias=False), (3, 7)),
    "linear wide": (nn.Linear(1280, 330), (4, 1280)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [(WEIGHT_BITS, 8), (4, 8), (WEIGHT_BITS, 3), (2, 2)])
def test_a_layer_is_its_simulation(randomize, name, bits):
    layer, shape = LAYERS[name]
    layer = randomize(copy.deepcopy(layer), 0)
    with torch.no_grad():
        layer.weight[1] = 0  # as pruning leaves it
    q = quant_model(layer, weight_quant_params={"n_bits": bits[0]}, act_quant_params={"n_bits": bits[1]})
    x = random(*shape)
    calibrate(q, (x,), margin=0.6)  # so that values are clipped at both ends
    got = to_int8(q)(x)
    assert got.dtype == torch.float32
    assert relative(got, q(x)) < 1e-5

    # Exact: integers by this test's own rounding, summed in float64, which holds them exactly.
    quantized, qmax = q.quantized_layers()[0], 2 ** (bits[1] - 1) - 1
    scale = quantized.act_scale.item()
    ints = (x / scale).round().clamp(-qmax, qmax).double()
    exact = copy.deepcopy(layer).double()
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    with torch.no_grad():
        exact.weight.copy_(quantized.integer_weight().double() * quantized.weight_scale.double().view(shape))
        assert relative(got.double(), exact(ints * scale)) < 1e-5


@pytest.mark.parametrize("kind", ["per tensor", "mse"])
def test_other_weight_scales(randomize, kind):
    setting = {"channel_wise": False} if kind == "per tensor" else {"scale_method": "mse"}
    x = random(2, 12, 6, 6)
    layer = randomize(nn.Conv2d(12, 20, 3), 0)
    q = calibrate(quant_model(layer, weight_quant_params={"n_bits": WEIGHT_BITS, **setting}), (x,))
    assert relative(to_int8(q)(x), q(x)) < 1e-5


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_kernels_that_write_no_bfloat16_round_float32(randomize, monkeypatch, kind):
    layer, shape = LAYERS[kind]
    q = calibrate(quant_model(randomize(copy.deepcopy(layer), 0)), (random(*shape),))
    m, x = to_int8(q).module, random(*shape)
    monkeypatch.setattr(int8_kernels, "computes_bfloat16", lambda: False)
    exact, start = m(x), m(x).neg().mul_(0.5).bfloat16()
    assert torch.equal(m(x, dtype=torch.bfloat16), exact.bfloat16())
    got = m(x, accumulate=start.clone(), dtype=torch.bfloat16)
    assert torch.equal(got, (start.float() + exact).bfloat16())


def test_inputs_are_clipped_alike_at_both_ends(randomize):
    # Two's complement has one more negative integer, which symmetric quantization does not use.
    q = calibrate(quant_model(randomize(nn.Linear(3, 2, bias=False), 0)), (torch.ones(1, 3),))
    m = to_int8(q)
    assert torch.equal(m(torch.full((1, 3), 99.0)), -m(torch.full((1, 3), -99.0)))
    assert relative(m(torch.full((1, 3), -99.0)), m(-torch.ones(1, 3))) == 0


def test_memory_formats_and_strides_do_not_matter(randomize):
    q = calibrate(quant_model(randomize(nn.Conv2d(6, 8, 3), 0)), (random(2, 6, 8, 8),))
    m, x = to_int8(q), random(2, 6, 8, 8)
    wanted = m(x)
    assert torch.equal(m(x.contiguous(memory_format=torch.channels_last)), wanted)
    assert torch.equal(m(torch.cat([x, x], 1)[:, :6]), wanted)
    assert torch.equal(m(x.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    assert wanted.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ["3x3", "strided", "dilated", "grouped", "same", "circular"])
def test_wide_convolutions_are_one_product_where_they_can(randomize, monkeypatch, name):
    layer, shape = LAYERS[name]
    x, accumulate = random(*shape), layer(random(*shape, seed=1)).detach()
    q = calibrate(quant_model(randomize(copy.deepcopy(layer), 0)), (x,), margin=0.6)
    convolution = to_int8(q).module
    monkeypatch.setattr("sdcomp.integer.int8_kernels._WIDE", 1)
    product = to_int8(q).module
    kinds = [type(module._packed[0]).__name__ for module in (convolution, product)]
    plain = name not in ("strided", "dilated", "grouped")
    assert kinds == ["PrepackedConv2d", "PrepackedConvAsMatmul" if plain else "PrepackedConv2d"]
    assert torch.equal(product.integer_weight(), convolution.integer_weight())
    assert relative(product(x), convolution(x)) < 1e-6
    assert product(x).is_contiguous(memory_format=torch.channels_last)
    accumulate = accumulate.contiguous(memory_format=torch.channels_last)
    assert relative(product(x, accumulate.clone()), convolution(x, accumulate.clone())) < 1e-6


class Shortcut(nn.Module):
    """What a skip concatenation feeds, on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(10, 8, 1)

    def shortcut_splits(self) -> dict[str, int]:
        return {"conv": 6, "skip": 6}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(x), self.skip(x)])


def test_split_shortcuts_are_two_integer_convolutions(randomize):
    x = random(2, 10, 6, 6)
    x[:, 6:] *= 30
    q = calibrate(quant_model(randomize(Shortcut(), 0), split_shortcuts=True), (x,))
    m = to_int8(q)
    assert relative(m(x), q(x)) < 1e-5
    assert torch.equal(m.conv.integer_weight(), q.module.conv.integer_weight())


KINDS = ["plain", "filters", "intervals", "split", "removed"]


def test_unets_are_as_close_to_the_exact_simulation_as_the_simulation(small):
    # Rounding flips cascade: two runs of the simulation on other kernels are some 28 dB apart. What all
    # approximate is the simulation in float64. One network's distance is a matter of luck, by some dB in
    # either direction and for any kernels, so the mean over all kinds and both memory formats is compared.
    formats = (torch.contiguous_format, torch.channels_last)
    ours, simulated = [], []
    for kind in KINDS:
        q = build(small.unet, kind)
        calls = [small_call(small, seed, t) for seed in range(3) for t in (100, 900)]
        calibrate(q, *calls)
        exact = copy.deepcopy(q).double()
        wanted = torch.stack([exact(x.double(), t, context.double()) for x, t, context in calls])
        for memory_format in formats:
            run = copy.deepcopy(q).to(memory_format=memory_format)
            simulated.append(decibels(torch.stack([run(*call) for call in calls]), wanted))
        ours.append(decibels(torch.stack([to_int8(q)(*call) for call in calls]), wanted))
    assert sum(ours) / len(ours) > sum(simulated) / len(simulated) - 1
    assert min(ours) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_unet_is_its_simulation(small, kind):
    q = build(small.unet, kind)
    call = small_call(small)
    calibrate(q, call, small_call(small, 1, 100))
    m = to_int8(q)
    found = {layer.name: layer for layer in m.modules() if isinstance(layer, Int8Layer)}
    errors = {}

    def compare(layer, args, out):
        single = found[layer.name]
        assert torch.equal(single.integer_weight(), layer.integer_weight())
        errors[layer.name] = relative(single(args[0]), out)

    m(*call)  # so that both are in the call's interval
    for layer in q.quantized_layers():
        layer.register_forward_hook(compare)
    q(*call)
    assert errors.keys() == found.keys()
    assert max(errors.values()) < 1e-5


def test_specialized_blocks_compute_what_the_plain_ones_do(small, monkeypatch):
    # Block by block, on equal inputs. oneDNN's GELU and PyTorch's differ in last bits on some CPUs. Now and
    # then that flips a rounding: one step of one value. Later roundings of a whole UNet would multiply it.
    found = {special.__name__: [] for special in _BLOCKS.values()}
    calls = [small_call(small), small_call(small, 1)]
    for kind in KINDS:
        q = calibrate(build(small.unet, kind), *calls)
        m = to_int8(q)
        with monkeypatch.context() as patch:
            patch.setattr("sdcomp.integer.int8_model.specialize", lambda module: module)
            plain = to_int8(q)

        def compare(block, args, out, special):
            given = copy.deepcopy(args)
            found[type(special).__name__].append(decibels(special(*given), out))
            assert all(torch.equal(a, b) for a, b in zip(given, args, strict=True))

        for name, block in plain.module.named_modules():
            if type(block) in _BLOCKS:
                block.register_forward_hook(partial(compare, special=m.module.get_submodule(name)))
        for call in calls:
            inputs = copy.deepcopy(call)
            m(*call)  # so that both are in the call's interval
            plain(*call)
            assert all(a is b or torch.equal(a, b) for a, b in zip(inputs, call, strict=True))
    for name, values in found.items():
        assert median(values) > 100, name
        assert min(values) > 40, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_large_images_take_the_same_way(small, monkeypatch, kind, dtype):
    call = small_call(small)
    m = to_int8(calibrate(build(small.unet, kind), call), dtype)
    wanted = m(*call)
    monkeypatch.setattr("sdcomp.integer.int8_blocks._LARGE", 1)
    monkeypatch.setattr("sdcomp.integer.int8_blocks._ROWS", 7)
    assert decibels(m(*call), wanted) > 80
    # One text for all, as the plain UNet takes it.
    x, t, context = call
    assert torch.equal(m(x, t, context[:1]), m(x, t, context[:1].expand(3, -1, -1)))


def test_blocks_by_themselves_leave_their_inputs_alone(small):
    block, x, context = small.unet.middle_block[1].transformer_blocks[0], random(2, 9, 32), random(2, 5, 32)
    q = calibrate(quant_model(block), (x, context))
    m, before = to_int8(q), x.clone()
    assert decibels(m(x, context), q(x, context)) > 30
    assert torch.equal(x, before)
    q = calibrate(quant_model(block.ff), (x,))
    crosswise = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert relative(to_int8(q)(crosswise), q(x)) < 1e-4


@pytest.mark.parametrize("removed", [["attn1"], ["attn2", "ff"]])
def test_blocks_inside_which_something_was_removed(small, removed):
    block, x, context = small.unet.middle_block[1].transformer_blocks[0], random(2, 9, 32), random(2, 5, 32)
    inside = {"attn1": "to_out.0", "attn2": "to_out.0", "ff": "net.2"}
    block = copy.deepcopy(block)
    for name in removed:
        keep_units(block, PruneGroup(name, "any", 1, (), inside[name]), [])
    q, before = calibrate(quant_model(block), (x, context)), x.clone()
    assert decibels(to_int8(q)(x, context), q(x, context)) > 30
    assert torch.equal(x, before)


def test_generating_leaves_the_model_as_it_is(small, tmp_path):
    call = small_call(small)
    m = to_int8(calibrate(quant_model(small.unet, quant_filters=["input_blocks.0"]), call))
    wanted = m(*call)
    small.replace(unet=m).generate(["a small red star"], steps=1)
    assert torch.equal(m(*call), wanted)
    assert torch.equal(load_int8(save_int8(m, tmp_path))(*call), wanted)


def test_each_interval_has_its_scales_and_its_errors(small):
    q = timestep_model(small.unet, k=2)
    x, _, context = small_call(small)
    calibrate(q, (0.1 * x, 100, context), (x, 900, context))
    m = to_int8(q)
    assert m.intervals == q.intervals
    for t in (100, torch.tensor([900, 900, 999]), torch.tensor(600.0)):
        assert decibels(m(x, t, context), q(x, t, context)) > 15
    assert decibels(m(x, 100, context), m(x, 900, context)) < 15
    for wrong, message in (
        (1001, "0 to 1000,"),
        (-1, "0 to 1000,"),
        (torch.tensor([1, 900, 2]), "different interv"),
    ):
        with pytest.raises(ValueError, match=message):
            m(x, wrong, context)
    with pytest.raises(TypeError, match="needs its timesteps"):
        m(x)


def test_a_block_gets_its_timestep_beside_its_arguments(randomize):
    q = timestep_model(randomize(nn.Linear(6, 5), 0), k=2, timestep_arg="t")
    x = random(3, 6)
    q.set_use_quant()
    for layer in q.quantized_layers():
        layer.set_act_scales(torch.tensor([0.01, 0.1]), torch.zeros(2))
    q.is_calibrated.fill_(True)
    m = to_int8(q)
    for t in (3, 997):
        assert relative(m(x, t=t), q(x, t=t)) < 1e-5
    assert relative(m(x, t=3), m(x, t=997)) > 0.1


def test_the_plain_model_stays_as_it_was_and_only_integers_are_kept(small):
    call = small_call(small)
    q = calibrate(quant_model(small.unet, quant_filters=["out"]), call)
    before, wanted = copy.deepcopy(q.state_dict()), q(*call)
    m = to_int8(q)
    assert torch.equal(q(*call), wanted)
    assert all(torch.equal(t, before[name]) for name, t in q.state_dict().items())
    state = m.module.state_dict()
    for layer in q.quantized_layers():
        assert state[f"{layer.name}.weight"].dtype is torch.int8
    held = {name for name, p in m.module.named_parameters() if p.dim() > 1}
    assert held == {"out.2.weight"}
    assert type(m.out[2]) is nn.Conv2d


def test_it_is_called_like_the_module(small):
    x, t, context = small_call(small)
    m = to_int8(calibrate(quant_model(small.unet), (x, t, context)))
    wanted = m(x, t, context)
    assert torch.equal(m(latents=x, timesteps=t, context=context), wanted)
    assert not wanted.requires_grad
    with torch.inference_mode():
        assert torch.equal(m(x.clone(), t, context), wanted)
    assert torch.equal(copy.deepcopy(m)(x, t, context), wanted)
    assert m.config == small.config.unet
    images = small.replace(unet=m).generate(["a small red star"], steps=2)
    assert images.shape == (1, 3, 64, 64)


def test_bfloat16_in_between(small):
    x, t, context = small_call(small)
    q = calibrate(quant_model(small.unet, quant_filters=["out"]), (x, t, context))
    m = to_int8(q, torch.bfloat16)
    got = m(x, t, context)
    assert got.dtype is torch.float32 and m.out[2].weight.dtype is torch.bfloat16
    assert m(x.bfloat16(), t, context).dtype is torch.bfloat16
    # Its error is of the size of quantization's own, not of another kind.
    assert decibels(got, q(x, t, context)) > 12
    # A timestep is not rounded: bfloat16 has no 999.
    assert torch.equal(m(x, torch.tensor(999.0), context), m(x, 999, context))


def test_the_text_says_what_is_integer(small):
    call = small_call(small)
    texts = set()
    for bits in (4, WEIGHT_BITS):
        q = calibrate(quant_model(small.unet, weight_quant_params={"n_bits": bits}), call)
        texts |= {
            repr(to_int8(q)),
            repr(to_int8(q, torch.bfloat16)),
            repr(to_int8(q, execution="dequantized")),
        }
    q = calibrate(timestep_model(small.unet, k=2), call, small_call(small, 0, 10))
    texts.add(repr(to_int8(q)))
    assert len(texts) == 7
    assert "[(0, 499), (500, 999)]" in repr(to_int8(q))


def test_diffusers_unet(diffusers, randomize):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = randomize(unet, 0).eval()
    call = (random(2, 4, 16, 16), 500, random(2, 7, 12, seed=1))
    q = calibrate(timestep_model(unet, k=2, split_shortcuts=True), call, (call[0], 10, call[2]))
    for dtype, least in ((torch.float32, 15), (torch.bfloat16, 12)):
        got = to_int8(q, dtype)(*call).sample
        assert got.dtype is torch.float32
        assert decibels(got, q(*call).sample) > least


def test_what_cannot_be_converted(small):
    q = quant_model(small.unet)
    with pytest.raises(NotCalibratedError, match="calibrate the model before"):
        to_int8(q)
    for side in ("weight", "act"):
        with pytest.raises(UserError, match="needs weights and activations quantized"):
            to_int8(quant_model(small.unet, **{f"{side}_quant_params": None}))
    calibrate(q, small_call(small))
    for dtype in (torch.float64, torch.int8, "float32"):
        with pytest.raises(ValueError, match="dtype must be"):
            to_int8(q, dtype)
    with pytest.raises(UserError, match="CPUs only, not on meta"):
        to_int8(q)(torch.empty(1, 4, 16, 16, device="meta"), 5, torch.empty(1, 24, 32, device="meta"))


@pytest.mark.parametrize(
    ("switches", "side"),
    [((True, False), "activations"), ((False, True), "weights"), ((False, False), "weights")],
)
def test_a_model_with_a_side_switched_off_is_refused(small, switches, side):
    # It would round what the simulation does not.
    q = calibrate(quant_model(small.unet, quantize_attention_products="scores"), small_call(small))
    with pytest.raises(UserError, match=rf"the {side} are switched off: call set_use_quant\(\)"):
        to_int8(q.set_use_quant(*switches))
    with pytest.raises(UserError, match="attention's products"):
        to_int8(q.set_use_quant())


def test_a_layer_that_did_not_run_while_calibrating_is_named():
    q = quant_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    q.is_calibrated.fill_(True)
    q.quantized_layers()[0].set_act_scales(torch.ones(1), torch.zeros(1))
    with pytest.raises(NotCalibratedError, match="layer 1 has no scale"):
        to_int8(q)(torch.ones(1, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_model_in_a_quarter(small, tmp_path, kind):
    call = small_call(small)
    q = calibrate(build(small.unet, kind), call, small_call(small, 1, 100))
    m = to_int8(q)
    assert save_int8(m, tmp_path / "m") == tmp_path / "m"
    for module in (None, q.module, copy.deepcopy(q.module).to("meta")):
        loaded = load_int8(tmp_path / "m", None if module is None else unquantized(module))
        assert torch.equal(loaded(*call), m(*call))
        assert repr(loaded) == repr(m)
    if kind in ("plain", "removed"):
        full = sum(p.nbytes for p in q.module.parameters())
        assert (tmp_path / "m" / "int8.safetensors").stat().st_size < 0.45 * full  # scales weigh here


def unquantized(module: nn.Module) -> nn.Module:
    """A module of the same architecture, with other weights."""
    plain = copy.deepcopy(module)
    for layer in plain.modules():
        if type(layer).__name__ in ("QuantConv2d", "QuantLinear"):
            layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
            for name in ("weight_scale", "act_scale", "act_clipped"):
                layer.__delattr__(name)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    return plain


def test_files_of_another_model_or_damaged_are_refused(small, tmp_path):
    q = calibrate(quant_model(small.unet), small_call(small))
    folder = save_int8(to_int8(q, torch.bfloat16), tmp_path / "m")
    assert load_int8(folder).dtype is torch.bfloat16
    with pytest.raises(QuantizationFileError, match="another module"):
        load_int8(folder, nn.Linear(3, 3))
    with pytest.raises(QuantizationFileError, match="another module"):
        load_int8(folder, prune_structured(small.unet, 0.3, mode="remove"))
    text = (folder / "int8.json").read_text()
    other = [("bfloat16", "bfloat17"), ("act_bits", "bits"), (": 8", ': "8"')]
    for damaged in ("", "[]", "{}", *(text.replace(*change) for change in other)):
        (folder / "int8.json").write_text(damaged)
        with pytest.raises(QuantizationFileError, match=r"int8\.json"):
            load_int8(folder)
    (folder / "int8.json").write_text(text)
    tensors = (folder / "int8.safetensors").read_bytes()
    (folder / "int8.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(QuantizationFileError, match=r"int8\.safetensors is damaged"):
        load_int8(folder)
    for name, wrong in {
        "middle_block.0.in_layers.2.weight": None,
        "middle_block.0.in_layers.2.act_scale": torch.ones(2),
        "middle_block.0.in_layers.2.weight_scale": torch.ones(3),
        "middle_block.0.in_layers.2.bias": torch.ones(1),
        "middle_block.0.out_layers.3.weight": torch.ones(32, 32, 3, 3),
        "middle_block.0.out_layers.3.weight_scale": torch.full((32,), float("nan")),
    }.items():
        state = load(tensors)
        assert name in state
        state[name] = wrong
        given = {key: tensor for key, tensor in state.items() if tensor is not None}
        save_file(given, folder / "int8.safetensors")
        with pytest.raises(
            QuantizationFileError, match=f"(another module|damaged): {name.rpartition('.')[0]} "
        ):
            load_int8(folder)
    (folder / "int8.safetensors").unlink()
    with pytest.raises(QuantizationFileError, match="has no int8.safetensors"):
        load_int8(folder)
    assert json.loads(text)["unet"]["model_channels"] == 16


@pytest.mark.slow
def test_stable_diffusion_15_is_as_close_to_its_simulation_as_that_to_itself():
    torch.manual_seed(0)
    unet = UNet(SD15.unet).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    call = (random(2, 4, 32, 32), 500, random(2, 77, 768, seed=1))
    q = calibrate(timestep_model(unet, k=2), call, (call[0], 100, call[2]))
    simulated, integer = q(*call), to_int8(q)(*call)
    # The same simulation, its convolutions by the kernels for the other memory format.
    again = q.to(memory_format=torch.contiguous_format)(*call)
    assert not torch.equal(again, simulated)
    assert decibels(integer, simulated) > decibels(again, simulated) - 1
