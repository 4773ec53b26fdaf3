"""Packed models against their simulation, bit for bit; their memory, types and files."""

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from quantized_models import Layers, build, calibrate, decibels, needs_kernels, random, small_call
from safetensors.torch import load_file, save_file
from torch import nn

from sdcomp.errors import UserError
from sdcomp.integer import PackedModel, load_packed, save_packed, to_int8, to_packed
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.model.offloading import weights_on
from sdcomp.pruning import prune_n_m, prune_structured, prune_unstructured
from sdcomp.quantization import (
    NotCalibratedError,
    QuantizationFileError,
    QuantModel,
    TimeStepCalibratedQuantModel,
)

KINDS = ["plain", "filters", "intervals", "split", "removed"]
WEIGHTS = {
    "W4": {"n_bits": 4},
    "W3 in groups": {"n_bits": 3, "granularity": "group", "group_size": 20},
    "affine W5": {"n_bits": 5, "symmetric": False},
    "affine W8": {"n_bits": 8, "symmetric": False},
    "W2, one scale": {"n_bits": 2, "granularity": "tensor"},
}


def quantized(sd, **params) -> QuantModel:
    return QuantModel(sd.unet, **{"weight_quant_params": {"n_bits": 4}, "act_quant_params": None, **params})


# The simulation


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_only_are_the_simulation_bit_for_bit(small, name):
    q, call = quantized(small, weight_quant_params=WEIGHTS[name]), small_call(small)
    before = copy.deepcopy(q.state_dict())
    packed = to_packed(q)
    assert torch.equal(packed(*call), q(*call))
    assert not torch.equal(packed(*call), small.unet(*call))
    assert all(torch.equal(tensor, before[key]) for key, tensor in q.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_inputs_are_the_simulation_bit_for_bit(small, tmp_path, kind):
    calls = [small_call(small, seed, t) for seed, t in ((0, 100), (1, 900))]
    q = calibrate(build(small.unet, kind), *calls)
    packed = to_packed(q)
    loaded = load_packed(save_packed(packed, tmp_path))
    assert repr(loaded) == repr(packed) and loaded.intervals == q.intervals
    for call in calls:
        assert torch.equal(packed(*call), q(*call))
        assert torch.equal(loaded(*call), q(*call))


@pytest.mark.parametrize("act", [{"symmetric": False}, {"granularity": "token"}])
def test_affine_inputs_and_scales_for_each_token(small, tmp_path, act):
    q, call = quantized(small, act_quant_params={"n_bits": 6, **act}), small_call(small)
    if act.get("granularity") != "token":
        calibrate(q, call)
        for layer in q.quantized_layers():
            layer.set_act_scales(layer.act_scale, layer.act_clipped, torch.full_like(layer.act_scale, 9))
    packed = to_packed(q)
    assert torch.equal(packed(*call), q(*call))
    assert torch.equal(load_packed(save_packed(packed, tmp_path))(*call), q(*call))


def test_bits_differ_by_layer_and_methods_choose_integers(small, tmp_path):
    q, call = quantized(small, overrides="ends_at_8_bits"), small_call(small)
    layer = q.quantized_layers()[5]
    layer.set_rounded(torch.zeros_like(layer.weight))
    packed = to_packed(q)
    assert torch.equal(packed(*call), q(*call))
    assert {part.weight_quantizer.n_bits for part in packed.quantized_layers()} == {4, 8}
    assert packed.weight_quantizer.n_bits == 4 and "4 and 8-bit weights" in repr(packed)
    assert torch.equal(load_packed(save_packed(packed, tmp_path))(*call), q(*call))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(12, 24, 3, groups=3, stride=2),
        nn.Conv2d(4, 6, 4, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False),
    ],
)
def test_convolutions_of_every_kind(randomize, layer):
    q = QuantModel(randomize(layer, 0), weight_quant_params={"n_bits": 3}, act_quant_params=None)
    x = random(2, layer.in_channels, 9, 8)
    assert torch.equal(to_packed(q)(x), q(x))


def test_switched_off_activations_are_not_rounded(small):
    q, call = build(small.unet, "plain"), small_call(small)
    with pytest.raises(NotCalibratedError, match=r"calibrate the model before to_packed.*activations=False"):
        to_packed(q)
    q.set_use_quant(activations=False)
    packed = to_packed(q)
    assert torch.equal(packed(*call), q(*call)) and packed.act_quantizer is None


def test_what_cannot_be_packed_is_refused(small):
    with pytest.raises(UserError, match="the weights are not quantized"):
        to_packed(QuantModel(small.unet, weight_quant_params=None))
    q = calibrate(quantized(
        small, act_quant_params={"n_bits": 8}, overrides={"out": {"weight_quant_params": None}}
    ), small_call(small))  # fmt: skip
    with pytest.raises(UserError, match=r"layer out\.2 cannot be packed, since its weight is not quantized"):
        to_packed(q)
    with pytest.raises(ValueError, match="dtype must be"):
        to_packed(quantized(small), torch.float64)
    with pytest.raises(UserError, match="quantized already"):
        QuantModel(to_packed(quantized(small)).module)


# Types and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_rounded_weights(small, tmp_path, dtype):
    q, call = quantized(small), small_call(small)
    rounded = copy.deepcopy(small.unet)
    with torch.no_grad():
        for layer in q.quantized_layers():
            rounded.get_parameter(f"{layer.name}.weight").copy_(layer.fake_weight())
    x, t, context = call
    wanted = rounded.to(dtype)(x.to(dtype), t, context.to(dtype))
    models = [to_packed(q, dtype), to_packed(q).to(dtype)]
    models += [load_packed(save_packed(models[0], tmp_path)), load_packed(tmp_path, dtype=dtype)]
    for packed in models:
        assert packed.dtype is dtype and str(dtype) in repr(packed)
        with torch.no_grad():
            assert torch.equal(packed(x.to(dtype), t, context.to(dtype)), wanted)
        assert packed(*call).dtype is torch.float32
    assert torch.equal(
        to_packed(q).to(dtype).float()(*call), load_packed(tmp_path, dtype=torch.float32)(*call)
    )
    assert decibels(wanted.float(), q(*call)) > 20
    with pytest.raises(ValueError, match="dtype must be"):
        models[0].to(torch.float64)


def test_one_dense_weight_is_alive_at_a_time(small, monkeypatch):
    packed, call = to_packed(quantized(small)), small_call(small)
    weights, places = [], set()
    unpack = NBitLayer.dense_weight

    def watch(layer, dtype):
        assert all(reference() is None for reference in weights)
        weight = unpack(layer, dtype)
        weights.append(weakref.ref(weight))
        places.add((weight.untyped_storage().data_ptr(), weight.untyped_storage().nbytes()))
        return weight

    packed(*call)
    monkeypatch.setattr(NBitLayer, "dense_weight", watch)
    packed(*call)
    layers = packed.quantized_layers()
    assert len(weights) == len(layers)
    ((_, size),) = places
    assert size == max(4 * torch.Size(layer.shape).numel() for layer in layers)
    # Apart from it there is no weight but the packed ones.
    held = {name for name, tensor in packed.state_dict().items() if tensor.dim() > 1}
    assert {name.rpartition(".")[2] for name in held} == {"packed_weight"}
    packed.clear_cache()
    assert packed._workspace._bytes is None


def test_copies_and_inference_mode(small):
    packed, call = to_packed(quantized(small)), small_call(small)
    wanted = packed(*call)
    assert not wanted.requires_grad
    copied = copy.deepcopy(packed)
    assert torch.equal(copied(*call), wanted)
    assert copied._workspace._bytes.data_ptr() != packed._workspace._bytes.data_ptr()
    with torch.inference_mode():
        inside = to_packed(quantized(small))
        assert torch.equal(inside(*call), wanted)
    assert torch.equal(inside(*call), wanted)


def test_the_weights_move_with_the_model(small):
    packed, call = to_packed(quantized(small)), small_call(small)
    wanted = packed(*call)
    with weights_on(packed, torch.device("meta")):
        x, t, context = call
        assert packed(x.to("meta"), t, context.to("meta")).device.type == "meta"
    assert torch.equal(packed(*call), wanted)
    packed.to("meta")
    assert {tensor.device.type for tensor in packed.state_dict().values()} == {"meta"}


@pytest.mark.cuda
def test_cuda_unpacks_the_same_weights(small):
    packed, call = to_packed(quantized(small)), small_call(small)
    wanted = packed(*call)
    weights = [layer.dense_weight(torch.float32).clone() for layer in packed.quantized_layers()]
    packed.to("cuda")
    for layer, weight in zip(packed.quantized_layers(), weights, strict=True):
        assert torch.equal(layer.dense_weight(torch.float32).cpu(), weight)
    x, t, context = call
    assert decibels(packed(x.cuda(), t, context.cuda()).cpu(), wanted) > 40


def test_a_model_can_be_exported(randomize):
    q = TimeStepCalibratedQuantModel(
        randomize(Layers(), 0), weight_quant_params={"n_bits": 4}, k=2, split_shortcuts=True
    )
    x = random(2, 6, 5, 5)
    calibrate(q, (0.5 * x, 100), (x, 900))
    packed = to_packed(q)
    for t in (100, 900):
        program = torch.export.export(packed, (x, t), strict=False)
        assert torch.equal(program.module()(x, t), packed(x, t))


# Integers


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_int8_execution_takes_packed_weights(small, kind):
    call = small_call(small)
    q = calibrate(build(small.unet, kind), call, small_call(small, 1, 100))
    from_packed, from_simulation = to_int8(to_packed(q)), to_int8(q)
    assert torch.equal(from_packed(*call), from_simulation(*call))
    assert repr(from_packed) == repr(from_simulation)
    with pytest.raises(UserError, match="the activations are not"):
        to_int8(to_packed(q.set_use_quant(activations=False)))


# Files


@pytest.mark.parametrize("name", WEIGHTS)
def test_files_hold_n_bits_a_weight(small, tmp_path, name):
    q, call = quantized(small, weight_quant_params=WEIGHTS[name]), small_call(small)
    save_packed(to_packed(q), tmp_path)
    for module in (None, small.config.unet, copy.deepcopy(small.unet).to("meta"), to_packed(q).module):
        loaded = load_packed(tmp_path, module)
        assert torch.equal(loaded(*call), q(*call))
    state = load_file(tmp_path / "packed.safetensors")
    stored = sum(t.nbytes for key, t in state.items() if key.endswith(("packed_weight", "weight_mask")))
    weights = sum(layer.weight.numel() for layer in q.quantized_layers())
    most = weights * WEIGHTS[name]["n_bits"] / 8
    # One scale and three levels: most weights are rounded to zero, and zeros are left out.
    assert stored < (0.6 if name == "W2, one scale" else 1.02) * most


PRUNED = {
    "half": lambda unet: prune_unstructured(unet, 0.5),
    "2:4": prune_n_m,
    "channels": lambda unet: prune_structured(unet, 0.4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("pruning", PRUNED)
@pytest.mark.parametrize("name", WEIGHTS)
def test_zeros_are_left_out_of_pruned_models(small, tmp_path, name, pruning, dtype):
    unet, call = PRUNED[pruning](small.unet), small_call(small)
    q = quantized(small.replace(unet=unet), weight_quant_params=WEIGHTS[name])
    packed = to_packed(q)
    loaded = load_packed(save_packed(packed, tmp_path), dtype=dtype)
    if dtype == torch.float32:
        assert torch.equal(packed(*call), q(*call)) and torch.equal(loaded(*call), q(*call))
    for layer, simulated in zip(loaded.quantized_layers(), q.quantized_layers(), strict=True):
        assert torch.equal(layer.dense_weight(dtype), simulated.fake_weight().to(dtype))
        assert torch.equal(layer.integer_weight(), simulated.integer_weight())
    state = load_file(tmp_path / "packed.safetensors")
    n_bits = WEIGHTS[name]["n_bits"]
    for layer in q.quantized_layers():
        weight, mask = (state.get(f"{layer.name}.{kind}") for kind in ("packed_weight", "weight_mask"))
        integers = layer.integer_weight()
        dense, sparse = n_bits * integers.numel(), integers.numel() + n_bits * int(integers.count_nonzero())
        if len(integers) % 8 == 0 and not 0.88 < sparse / dense < 0.92:
            assert (mask is not None) == (sparse < 0.9 * dense)
        if mask is not None:
            assert sparse <= 8 * (weight.nbytes + mask.nbytes) <= sparse + 8 * n_bits + 8
    assert ("zeros left out" in str(loaded)) == any(key.endswith("weight_mask") for key in state)


def test_a_layer_may_be_all_zeros(small, tmp_path):
    q, call = quantized(small), small_call(small)
    layer = q.quantized_layers()[5]
    layer.set_rounded(torch.zeros_like(layer.weight))
    loaded = load_packed(save_packed(to_packed(q), tmp_path))
    assert torch.equal(loaded(*call), q(*call))
    assert load_file(tmp_path / "packed.safetensors")[f"{layer.name}.packed_weight"].numel() == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_weights_stay_mapped_from_the_file(small, tmp_path):
    save_packed(to_packed(quantized(small)), tmp_path)
    packed = load_packed(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        tuple(int(end, 16) for end in line[0].split("-"))
        for line in maps
        if line[-1] == str(tmp_path / "packed.safetensors")
    ]
    for layer in packed.quantized_layers():
        place = layer.packed_weight.data_ptr()
        assert any(start <= place < end for start, end in mapped)


def test_what_float16_holds_exactly_is_stored_in_it(small, tmp_path):
    half = copy.deepcopy(small.unet).half().float()
    q = QuantModel(half, act_quant_params=None)
    layer = q.quantized_layers()[3]
    layer.set_weight_grids([grid._replace(scale=grid.scale.half().float()) for grid in layer.weight_grids()])
    packed = to_packed(q)
    save_packed(packed, tmp_path)
    state = load_file(tmp_path / "packed.safetensors")
    assert state["out.0.weight"].dtype is torch.float16 and state["out.2.bias"].dtype is torch.float16
    kinds = {name: tensor.dtype for name, tensor in state.items() if name.endswith("weight_scale")}
    assert kinds.pop(f"{layer.name}.weight_scale") is torch.float16
    assert set(kinds.values()) == {torch.float32}
    call = small_call(small)
    assert torch.equal(load_packed(tmp_path)(*call), q(*call))


def test_other_modules_than_our_unet(diffusers, randomize, tmp_path):
    layer = randomize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 0)
    q = QuantModel(layer, weight_quant_params={"n_bits": 4}, act_quant_params=None)
    save_packed(to_packed(q), tmp_path)
    x = random(2, 6)
    assert torch.equal(load_packed(tmp_path, layer)(x), q(x))
    with pytest.raises(QuantizationFileError, match="does not say what the module is"):
        load_packed(tmp_path)
    with pytest.raises(QuantizationFileError, match="of another module"):
        load_packed(tmp_path, nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)))


@pytest.fixture
def folder(small, tmp_path):
    q = calibrate(QuantModel(
        small.unet, weight_quant_params={"n_bits": 4, "symmetric": False}, split_shortcuts=True,
    ), small_call(small))  # fmt: skip
    return save_packed(to_packed(q), tmp_path)


def change(table: dict, path: str, value: object) -> None:
    *path, last = path.split("/")
    for name in path:
        table = table[int(name) if isinstance(table, list) else name]
    table[int(last) if isinstance(table, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dtype", "float64", "dtype is 'float64'"),
        ("starts", [5], "starts is"),
        ("quantizers", [], "quantizers is"),
        ("quantizers/0/0/n_bits", 9, "n_bits must be 2 to 8"),
        ("quantizers/0/0/n_bits", True, "n_bits must be a whole number"),
        ("quantizers/0/0/granularity", "token", "granularity of weights must be"),
        ("quantizers/0/0/granularity", "group", "splits: .* is no layer, or one with groups"),
        ("quantizers/0/0", None, "that of a weight is missing"),
        ("layers/out.2", 7, "layers: "),
        ("layers", {}, "layers: "),
        ("splits/nothing", 3, "splits: 'nothing' is no layer"),
        ("unet/model_channels", 2**40, "unet: "),
        ("more", 1, "no setting 'more'"),
    ],
)
def test_settings_that_are_wrong_are_named(folder, path, value, message):
    settings = json.loads((folder / "packed.json").read_text())
    change(settings, path, value)
    (folder / "packed.json").write_text(json.dumps(settings))
    with pytest.raises(QuantizationFileError, match=rf"packed\.json is damaged: .*{message}"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [("layers/nowhere", 0), ("layers/out.0", 0), ("splits/out.2", 99), ("splits/time_embed.0", 3)],
)
def test_layers_that_the_module_does_not_have_are_named(folder, path, value):
    settings = json.loads((folder / "packed.json").read_text())
    change(settings, path, value)
    (folder / "packed.json").write_text(json.dumps(settings))
    with pytest.raises(
        QuantizationFileError, match=f"of another module: .*{path.rpartition('/')[2]}.* differ"
    ):
        load_packed(folder)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("packed_weight", None, "of another module"),
        ("packed_weight", torch.zeros(1, 2, 144), "of another module"),
        ("packed_weight", torch.zeros(1, 3, 144, dtype=torch.uint8), "of another module"),
        ("weight_scale", torch.ones(3), "of another module"),
        ("weight_scale", torch.tensor([1, 1, 1, float("nan")]), "damaged"),
        ("weight_scale", torch.zeros(4), "damaged"),
        ("weight_zero_point", torch.full((4,), 16, dtype=torch.uint8), "damaged"),
        ("weight_zero_point", None, "of another module"),
        ("act_scale", torch.tensor([-1.0]), "damaged"),
        ("act_zero_point", torch.tensor([1.0]), "of another module"),
        ("bias", torch.full((4,), float("inf")), "damaged"),
        ("more", torch.zeros(1), "of another module"),
    ],
)
def test_tensors_that_are_wrong_are_named(folder, kind, value, message):
    file = folder / "packed.safetensors"
    state = load_file(file)
    state[f"out.2.{kind}"] = value
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    with pytest.raises(QuantizationFileError, match=rf"packed\.safetensors is {message}: out\.2"):
        load_packed(folder)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("weight_mask", lambda t: None, "of another module"),
        ("weight_mask", lambda t: t[:-1], "of another module"),
        ("weight_mask", lambda t: t.float(), "of another module"),
        ("weight_mask", torch.zeros_like, "damaged: .*other numbers of values than their masks say"),
        ("weight_mask", lambda t: ~t, "damaged: .*other numbers of values than their masks say"),
        ("packed_weight", lambda t: t[:, :-1], "damaged: .*other numbers of values than their masks say"),
        ("packed_weight", lambda t: t.expand(-1, -1, 2), "of another module"),
        ("packed_weight", lambda t: t.view(-1), "of another module"),
        ("packed_weight", lambda t: None, "of another module"),
    ],
)
def test_masks_that_are_wrong_are_named(small, tmp_path, kind, change, message):
    unet = prune_unstructured(small.unet, 0.6)
    folder = save_packed(to_packed(quantized(small.replace(unet=unet))), tmp_path)
    file = folder / "packed.safetensors"
    state = load_file(file)
    name = f"input_blocks.0.0.{kind}"
    changed = change(state.pop(name))
    save_file(state if changed is None else {**state, name: changed.contiguous()}, file)
    with pytest.raises(QuantizationFileError, match=rf"packed\.safetensors is {message}.*"):
        load_packed(folder)


def test_files_that_are_missing_or_cut_are_named(folder):
    file = folder / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(QuantizationFileError, match=r"packed\.safetensors is damaged"):
        load_packed(folder)
    file.unlink()
    with pytest.raises(QuantizationFileError, match=r"has no packed\.safetensors"):
        load_packed(folder)


def test_it_is_called_like_the_module(small):
    x, t, context = small_call(small)
    packed = to_packed(quantized(small))
    assert isinstance(packed, PackedModel) and packed.config == small.config.unet
    assert torch.equal(packed(latents=x, timesteps=t, context=context), packed(x, t, context))
    images = small.replace(unet=packed).generate(["a small red star"], steps=2)
    wanted = small.replace(unet=quantized(small)).generate(["a small red star"], steps=2)
    assert torch.equal(images, wanted)
