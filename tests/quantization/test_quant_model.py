"""Quantized models: what they compute, what they share, what they refuse."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers_keys import diffusers_unet, unet_name, unet_state
from torch import nn
from torch.nn.utils import prune

from sdcomp.errors import UserError
from sdcomp.integer import to_int8
from sdcomp.model.offloading import weights_on
from sdcomp.model.unet import ResBlock
from sdcomp.quantization import (
    PRESETS,
    NotCalibratedError,
    QuantConv2d,
    QuantModel,
    Recipe,
    TimeStepCalibratedQuantModel,
    build,
    describe,
)
from sdcomp.quantization.layer_patterns import matches
from sdcomp.quantization.shortcuts import shortcut_splits

EIGHT = {"n_bits": 8}


def inputs(unet, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    latents = torch.randn(batch, config.in_channels, 8, 8, generator=generator)
    context = torch.randn(batch, 5, config.context_dim, generator=generator)
    return latents, torch.full((batch,), 401), context


def their_name(name: str, unet) -> str:
    """A layer of our UNet as diffusers calls it."""
    return unet_name(f"{name}.weight", unet.config).removesuffix(".weight")


def calibrated(model: QuantModel, scale: float = 0.05) -> QuantModel:
    """Some scale for every input, each layer its own."""
    for i, layer in enumerate(model.quantized_layers()):
        steps = torch.arange(layer.act_scale.numel()).view(layer.act_scale.shape)
        layer.set_act_scales(scale * (1 + 0.01 * i + 0.1 * steps), torch.zeros_like(layer.act_scale))
    model.is_calibrated.fill_(True)
    return model


def fake(x: torch.Tensor, scale: torch.Tensor, qmax: int = 127) -> torch.Tensor:
    """By the definition, in double precision."""
    return (x.double() / scale.double()).round().clamp(-qmax, qmax) * scale.double()


def test_a_layer_computes_with_rounded_weights_and_inputs():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(3, 6, 8, 8)
    q = calibrated(QuantModel(module, weight_quant_params={"n_bits": 4}, act_quant_params={"n_bits": 6}))
    conv, linear = q.quantized_layers()
    assert conv.weight_scale.shape == (8,) and linear.weight_scale.shape == (5,)
    assert torch.equal(conv.weight_scale, module[0].weight.detach().abs().amax(dim=(1, 2, 3)) / 7)

    def weight(layer):
        return fake(layer.weight, layer.weight_scale.view(-1, *[1] * (layer.weight.dim() - 1)), 7)

    h = F.conv2d(fake(x, conv.act_scale, 31), weight(conv), conv.bias.double(), stride=2, padding=1)
    expected = F.linear(fake(h.flatten(1), linear.act_scale, 31), weight(linear), linear.bias.double())
    assert torch.allclose(q(x).double(), expected, atol=1e-4)
    assert (q(x) - module(x)).abs().max() > 0.01
    assert torch.equal(conv.integer_weight() * conv.weight_scale.view(-1, 1, 1, 1), conv.fake_weight())


def test_with_both_switches_off_the_plain_module_runs(small):
    args = inputs(small.unet)
    expected = small.unet(*args)
    for q in (QuantModel(small.unet), TimeStepCalibratedQuantModel(small.unet, k=2, split_shortcuts=True)):
        with pytest.raises(NotCalibratedError):
            q(*args)
        assert torch.equal(q.set_use_quant(False, False)(*args), expected)
        weights = q.set_use_quant(weights=True, activations=False)(*args)
        assert not torch.equal(weights, expected)
        calibrated(q)
        assert not torch.equal(q.set_use_quant(True, True)(*args), weights)
        assert torch.equal(q.set_use_quant(False, False)(*args), expected)
        acts = q.set_use_quant(False, True)(*args)
        assert not torch.equal(acts, expected) and not torch.equal(acts, weights)


def test_one_layer_alone(small):
    args = inputs(small.unet)
    q = calibrated(QuantModel(small.unet))
    name = "middle_block.0.in_layers.2"
    others = [layer.name for layer in q.quantized_layers() if layer.name != name]
    with q.only(name):
        made = q(*args)
    alone = calibrated(QuantModel(small.unet, quant_filters=others))
    scale = next(layer for layer in q.quantized_layers() if layer.name == name).act_scale
    alone.quantized_layers()[0].set_act_scales(scale, torch.zeros(1))
    assert torch.equal(made, alone(*args)) and not torch.equal(made, q(*args))
    with pytest.raises(ValueError, match="no quantized layer 'nowhere'"), q.only("nowhere"):
        pass


def test_one_side_alone(small):
    args = inputs(small.unet)
    both = calibrated(QuantModel(small.unet))
    weights = QuantModel(small.unet, weight_quant_params=EIGHT, act_quant_params=None)
    assert weights.calibrated
    assert torch.equal(weights(*args), both.set_use_quant(True, False)(*args))
    acts = QuantModel(small.unet, weight_quant_params=None, act_quant_params=EIGHT)
    assert not acts.calibrated
    assert torch.equal(calibrated(acts)(*args), both.set_use_quant(False, True)(*args))
    with pytest.raises(ValueError, match="not quantized"):
        acts.quantized_layers()[0].integer_weight()
    with pytest.raises(ValueError, match="nothing to quantize"):
        QuantModel(small.unet, weight_quant_params=None, act_quant_params=None)


def test_weights_are_shared_and_the_module_stays_as_it_is(small):
    before = copy.deepcopy(small.unet.state_dict())
    q = calibrated(QuantModel(small.unet))
    q(*inputs(small.unet))
    originals = dict(small.unet.named_parameters())
    assert dict(q.module.named_parameters()).keys() == originals.keys()
    for name, parameter in q.module.named_parameters():
        assert parameter.data_ptr() == originals[name].data_ptr(), name
    q.to(torch.bfloat16)
    assert small.unet.state_dict().keys() == before.keys()
    for name, tensor in small.unet.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert not any(isinstance(layer, QuantConv2d) for layer in small.unet.modules())
    assert q.config == small.unet.config


def test_no_dict_of_the_caller_changes_and_one_serves_both():
    shared = {"n_bits": 5}
    q = QuantModel(nn.Linear(4, 3), weight_quant_params=shared, act_quant_params=shared)
    assert shared == {"n_bits": 5}
    assert q.weight_quantizer.channel_wise and not q.act_quantizer.channel_wise
    shared = {"n_bits": 5, "channel_wise": True}
    q = QuantModel(nn.Linear(4, 3), weight_quant_params=shared, act_quant_params=shared)
    assert q.weight_quantizer.channel_wise and not q.act_quantizer.channel_wise
    q = QuantModel(nn.Linear(4, 3), weight_quant_params={"n_bits": 5, "channel_wise": False})
    assert q.quantized_layers()[0].weight_scale.shape == (1,)


def test_a_weight_that_changes_is_rounded_anew():
    q = QuantModel(nn.Linear(4, 3, bias=False), act_quant_params=None)
    layer = q.quantized_layers()[0]
    with torch.inference_mode():
        first = q(torch.eye(4))
        assert layer.fake_weight() is layer.fake_weight()
    with torch.no_grad():
        layer.weight[0] = 0
    assert (q(torch.eye(4))[:, 0] == 0).all() and not (first[:, 0] == 0).all()


def test_a_weight_replaced_by_another_tensor_is_rounded_anew():
    q = QuantModel(nn.Linear(4, 3, bias=False), act_quant_params=None)
    layer = q.quantized_layers()[0]
    first = q(torch.eye(4))
    layer.weight = nn.Parameter(torch.zeros(3, 4))
    assert layer.weight._version == 0 and first.any() and not q(torch.eye(4)).any()


def test_rounded_weights_are_freed():
    for free in (
        lambda q: q.clear_cache(),
        lambda q: q.set_use_quant(weights=False).set_use_quant(),
        lambda q: q.to(torch.float64),
    ):
        q = QuantModel(nn.Linear(4, 3), act_quant_params=None)
        expected = q(torch.eye(4))
        kept = weakref.ref(q.quantized_layers()[0].fake_weight())
        assert kept() is not None
        free(q)
        assert kept() is None
        assert torch.allclose(q.float()(torch.eye(4)), expected)


def test_nothing_stays_on_a_device_that_weights_were_copied_to(small):
    latents, timesteps, context = inputs(small.unet)
    q = calibrated(QuantModel(copy.deepcopy(small.unet)))
    expected, meta = q(latents, timesteps, context), torch.device("meta")

    def borrow() -> None:
        with weights_on(q, meta):
            assert q(latents.to(meta), timesteps.to(meta), context.to(meta)).is_meta
            kept = weakref.ref(q.quantized_layers()[0].fake_weight())
            # The steps of a generation borrow what it has borrowed: one copy serves all.
            with weights_on(q, meta):
                assert q.quantized_layers()[0].fake_weight() is kept()
            assert kept().is_meta
        assert kept() is None

    borrow()
    assert torch.equal(q(latents, timesteps, context), expected)
    # A change between two such calls is seen.
    with torch.no_grad():
        for p in q.parameters():
            p.zero_()
    borrow()
    assert not q(latents, timesteps, context).any()


def test_an_offloaded_model_follows_its_weights(small):
    sd = copy.deepcopy(small)
    q = calibrated(QuantModel(sd.unet))
    plain, offloaded = sd.replace(unet=q), sd.replace(unet=q).offload("cpu")
    images = []
    for _ in range(2):
        images.append(offloaded.generate("a blue circle", steps=2))
        assert torch.equal(images[-1], plain.generate("a blue circle", steps=2))
        with torch.no_grad():
            sd.unet.out[2].weight.mul_(0.5)
    assert not torch.equal(*images)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_input_that_layers_share_is_rounded_once(small, monkeypatch, mode):
    from sdcomp.quantization import shared_state

    q = calibrated(QuantModel(small.unet))
    names = [layer.name for layer in q.quantized_layers()]
    for layer in q.quantized_layers():  # queries, keys and values saw the same and have one scale
        if layer.name.endswith((".to_q", ".to_k", ".to_v")):
            layer.set_act_scales(torch.tensor([0.04]), torch.zeros(1))
    q.set_use_quant(weights=False)
    seen = []

    def counting(x, scale, qmax, low):
        seen.append(x.shape)
        return fake(x, torch.tensor(scale), qmax).float()

    monkeypatch.setattr(shared_state, "fake_quantize", counting)
    with mode():
        args = inputs(small.unet)
        made = q(*args)
    self_attentions = sum(name.endswith("attn1.to_q") for name in names)
    cross_attentions = sum(name.endswith("attn2.to_q") for name in names)
    assert self_attentions and len(seen) == len(names) - 2 * self_attentions - cross_attentions
    # What the layers keep between them is gone with the call.
    assert q.state._last._kept is None
    assert not made.requires_grad


def test_an_input_changed_in_place_is_rounded_again():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x + 0
            return self.a(x) + self.b(x.mul_(-3))

    module = InPlace()
    q = QuantModel(module, weight_quant_params=None)
    for layer in q.quantized_layers():
        layer.set_act_scales(torch.tensor([0.01]), torch.zeros(1))
    x = torch.tensor([[0.1, 0.2, -0.3]])
    with torch.inference_mode():
        assert torch.allclose(q(x), module(x), atol=1e-5)


def test_an_uncalibrated_layer_is_named(small):
    q = calibrated(TimeStepCalibratedQuantModel(small.unet, k=2))
    args = inputs(small.unet)
    q(*args)
    layer = q.quantized_layers()[7]
    layer.set_act_scales(torch.tensor([0.0, 1.0]), torch.zeros(2))
    with pytest.raises(NotCalibratedError, match=f"layer {layer.name} has no scale .* in interval 0"):
        q(*args)
    q(args[0], torch.tensor([500, 999]), args[2])
    # Neither is it known after a state without it is loaded.
    state = q.state_dict()
    fresh = calibrated(TimeStepCalibratedQuantModel(small.unet, k=2))
    fresh(*args)
    fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=layer.name):
        fresh(*args)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("out", "out.2", True),
        ("out", "output_blocks.0.0.skip_connection", False),
        ("out", "middle_block.out.2", False),
        ("input_blocks.1", "input_blocks.1.0.in_layers.2", True),
        ("input_blocks.1", "input_blocks.10.0.op", False),
        ("input_blocks.*.0", "input_blocks.10.0.op", True),
        ("input_blocks.*.0", "input_blocks.10.1.proj_in", False),
        ("*.to_v", "middle_block.1.transformer_blocks.0.attn2.to_v", True),
        ("*.to_v", "to_v", True),
        ("*.to_?", "a.to_k", True),
        ("*.to", "a.to_k", False),
        ("*.attn2.to_*", "a.0.attn2.to_out.0", True),
        ("*.attn2.to_v", "a.attn1.to_v", False),
        ("*", "anything", True),
        ("a.b.c", "a.b", False),
        ("", "a", False),
    ],
)
def test_filters_match_whole_components(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_filtered_layers_are_left_plain(small):
    q = QuantModel(small.unet, quant_filters=["time_embed", "out", "*.to_v"])
    table = describe(q).set_index("name")
    left = {name for name in table.index if table.left_out[name]}
    layers = [name for name, m in small.unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert left == {n for n in layers if n.startswith(("time_embed.", "out.")) or n.endswith(".to_v")}
    assert list(table.index) == layers
    assert type(q.module.out[2]) is nn.Conv2d
    assert table.left_out["out.2"] == "filter 'out'"
    assert {layer.name for layer in q.quantized_layers()} == set(layers) - left


@pytest.mark.parametrize("wrong", [["outs"], ["out", "*.to_w"], [""], ["input_blocks.99"]])
def test_a_filter_that_matches_nothing_is_refused(small, wrong):
    with pytest.raises(ValueError, match=f"filter '{wrong[-1]}' matches no layer".replace("*", r"\*")):
        QuantModel(small.unet, quant_filters=wrong)


def test_other_wrong_filters(small):
    with pytest.raises(ValueError, match="must be a list of names such as .'out'."):
        QuantModel(small.unet, quant_filters="out")
    with pytest.raises(TypeError):
        QuantModel(small.unet, quant_filters=[3])
    with pytest.raises(ValueError, match="leave out every"):
        QuantModel(small.unet, quant_filters=["*"])
    with pytest.raises(ValueError, match="filters are for UNets"):
        QuantModel(nn.Linear(2, 2), quant_filters="published")


def test_published_filters_name_the_same_layers_in_diffusers(tiny, diffusers):
    theirs = diffusers_unet(diffusers, tiny.config.unet)
    left = [
        set(QuantModel(m, act_quant_params=None, quant_filters="published").left_out)
        for m in (tiny.unet, theirs)
    ]
    assert left[1] == {their_name(name, tiny.unet) for name in left[0]}
    ends = ("input_blocks.", "output_blocks.")
    blocks = {".".join(name.split(".")[:2]) for name in left[0] if name.startswith(ends)}
    assert blocks == {"input_blocks.0", "input_blocks.1", "output_blocks.5"}


def test_intervals_are_found_by_timestep(small):
    q = calibrated(TimeStepCalibratedQuantModel(small.unet, timesteps=8, k=4))
    assert q.intervals == [(0, 249), (250, 499), (500, 749), (750, 999)]
    latents, _, context = inputs(small.unet)
    made = {}
    for t in (0, 249, 250, 999):
        made[t] = q(latents, torch.tensor([t, t]), context)
        expected = QuantModel(small.unet)
        for layer, own in zip(expected.quantized_layers(), q.quantized_layers(), strict=True):
            layer.set_act_scales(own.act_scale[t // 250][None], torch.zeros(1))
        assert torch.equal(made[t], expected(latents, torch.tensor([t, t]), context))
        assert torch.equal(made[t], q(latents, t, context))
        assert torch.equal(made[t], q(latents, context=context, timesteps=torch.tensor(t)))
    assert q(latents, torch.tensor([251, 499]), context).isfinite().all()
    with pytest.raises(ValueError, match=r"249 and 250 .* \(0, 249\) and \(250, 499\)"):
        q(latents, torch.tensor([249, 250]), context)
    assert torch.equal(q(latents, 1000.0, context), q(latents, torch.tensor(1000.0), context))
    for wrong in (-1, 1000.1, float("nan")):
        with pytest.raises(ValueError, match="0 to 1000,"):
            q(latents, torch.tensor([wrong, wrong]), context)
    with pytest.raises(TypeError, match="needs its timesteps"):
        q(latents)


def test_a_wrapped_block_takes_its_timestep_from_the_argument_named(randomize):
    block = randomize(ResBlock(8, 8, 16, 4), 0)
    q = TimeStepCalibratedQuantModel(block, k=2, timestep_arg="timesteps")
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    calibrated(q)
    low, high = (q(x, emb, timesteps=torch.tensor([t, t])) for t in (3, 997))
    assert not torch.equal(low, high)
    with pytest.raises(TypeError, match="'timesteps'"):
        q(x, emb)


def test_what_is_quantized_already_is_refused(small):
    q = calibrated(QuantModel(small.unet))
    for module in (
        q,
        q.module,
        nn.Sequential(nn.Linear(2, 2), q),
        to_int8(q, execution="dequantized"),
        to_int8(q),
    ):
        for kind in (QuantModel, TimeStepCalibratedQuantModel):
            with pytest.raises(
                UserError, match=f"^this {type(module).__name__} is quantized already: quantize"
            ):
                kind(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_weights_that_are_not_finite_are_refused_by_name(small, value, method):
    unet = copy.deepcopy(small.unet)
    with torch.no_grad():
        unet.middle_block[1].proj_in.weight[3, 2] = value
    params = {"n_bits": 8, "scale_method": method}
    with pytest.raises(UserError, match=r"^the weight of layer middle_block\.1\.proj_in has NaN or infinite"):
        QuantModel(unet, weight_quant_params=params)
    QuantModel(unet, weight_quant_params=params, quant_filters=["middle_block"])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"k": 5, "timesteps": 4}, ValueError, "k=5 intervals need"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 2.0}, TypeError, "whole number"),
        ({"timesteps": 1001}, ValueError, "1000 training timesteps"),
        ({"boundaries": "best"}, ValueError, "'uniform' or 'optimal'"),
        ({"timestep_arg": -1}, TypeError, "position or a name"),
        ({"weight_quant_params": {"bits": 8}}, TypeError, "bits"),
        ({"act_quant_params": {"n_bits": 9}}, ValueError, "2 to 8"),
    ],
)
def test_wrong_arguments_are_refused(small, wrong, error, message):
    with pytest.raises(error, match=message):
        TimeStepCalibratedQuantModel(small.unet, **wrong)


def test_the_halves_of_a_skip_concatenation_have_their_own_scales(small):
    q = calibrated(QuantModel(small.unet, split_shortcuts=True))
    splits = small.unet.shortcut_splits()
    assert {layer.name for layer in q.quantized_layers() if layer.split} == set(splits)
    for i in range(len(small.unet.output_blocks)):
        assert {f"output_blocks.{i}.0.in_layers.2", f"output_blocks.{i}.0.skip_connection"} <= set(splits)
    for layer in q.quantized_layers():
        if layer.split is None:
            continue
        channels, out = layer.in_channels, layer.out_channels
        assert 0 < layer.split == splits[layer.name] < channels
        assert layer.weight_scale.shape == (2, out) and layer.act_scale.shape == (1, 2)
        x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
        parts = []
        for half, part in enumerate((slice(layer.split), slice(layer.split, channels))):
            weight = layer.weight.detach()[:, part]
            top = weight.abs().amax(dim=(1, 2, 3))
            assert torch.equal(layer.weight_scale[half], top / 127)
            rounded = fake(weight, layer.weight_scale[half].view(-1, 1, 1, 1))
            parts.append(F.conv2d(fake(x[:, part], layer.act_scale[0, half]), rounded, padding=layer.padding))
        expected = parts[0] + parts[1] + layer.bias.double().view(-1, 1, 1)
        # One weight that lies at a half may round the other way; a step of the input is ten times more.
        assert torch.allclose(layer(x).double(), expected, atol=5e-3)
        assert layer.integer_weight().shape == layer.weight.shape


def test_splits_are_where_the_skips_join(small, tiny, diffusers):
    """The concatenations as they happen."""
    for unet in (small.unet, tiny.unet):
        joined, real = [], torch.cat

        def cat(tensors, dim=0, joined=joined, real=real):
            if len(tensors) == 2 and tensors[0].dim() == 4 and dim == 1:
                joined.append(tensors[0].shape[1])
            return real(tensors, dim=dim)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "cat", cat)
            unet(*inputs(unet))
        splits = unet.shortcut_splits()
        assert [splits[f"output_blocks.{i}.0.in_layers.2"] for i in range(len(joined))] == joined
        theirs = shortcut_splits(diffusers_unet(diffusers, unet.config))
        assert theirs == {their_name(name, unet): n for name, n in splits.items()}


def test_hooks_are_called_as_they_were_registered():
    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append("before"), with_kwargs=True)
    layer.register_forward_hook(lambda m, args, kwargs, out: seen.append("after"), with_kwargs=True)
    layer.register_forward_hook(lambda m, args, out: seen.append("always"), always_call=True)
    q = QuantModel(nn.Sequential(layer), act_quant_params=None)
    q(torch.ones(1, 2))
    assert seen == ["before", "after", "always"]
    with pytest.raises(RuntimeError):
        q(torch.ones(1, 3))
    assert seen[3:] == ["before", "always"]


@pytest.mark.parametrize("asked", [1, 0, None, "yes"])
def test_split_shortcuts_is_a_switch(small, asked):
    # A saved model with another value could not be loaded.
    with pytest.raises(TypeError, match=f"split_shortcuts must be True or False, not {asked!r}"):
        QuantModel(small.unet, split_shortcuts=asked)


def test_a_module_without_skips_cannot_be_split():
    with pytest.raises(ValueError, match="Linear does not tell where its skip concatenations are"):
        QuantModel(nn.Linear(2, 2), split_shortcuts=True)


@pytest.mark.parametrize("kind", [QuantModel, TimeStepCalibratedQuantModel])
def test_diffusers_unet_gives_what_ours_gives(small, diffusers, kind):
    theirs = diffusers_unet(diffusers, small.config.unet)
    theirs.load_state_dict(unet_state(small.unet))
    latents, timesteps, context = inputs(small.unet)
    settings = {
        "weight_quant_params": {"n_bits": 8},
        "act_quant_params": {"n_bits": 8},
        "split_shortcuts": True,
    }
    ours, other = (kind(m, **settings) for m in (small.unet, theirs))
    by_name = {layer.name: layer for layer in other.quantized_layers()}
    for layer in calibrated(ours, 0.03).quantized_layers():
        name = their_name(layer.name, small.unet)
        by_name.pop(name).set_act_scales(layer.act_scale, layer.act_clipped)
    assert not by_name
    plain = small.unet(latents, timesteps, context)
    expected = ours(latents, timesteps, context)
    for made in (
        other(latents, timesteps, context).sample,
        other(latents, 401, encoder_hidden_states=context, return_dict=False)[0],
        other(latents, timestep=401, encoder_hidden_states=context).sample,
    ):
        # Roundings that fall the other way after a last-bit difference are all that may differ.
        assert (made - expected).pow(2).mean() < 0.05 * (expected - plain).pow(2).mean()


def test_copies_pickles_and_conversions_compute_the_same(small):
    q = calibrated(TimeStepCalibratedQuantModel(small.unet, k=2, split_shortcuts=True))
    args = inputs(small.unet)
    expected = q(*args)
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(*args), expected)
        assert all(layer.state is twin.state for layer in twin.quantized_layers())
        twin.set_use_quant(False, False)
    assert torch.equal(q(*args), expected)
    scales = [layer.act_scale.clone() for layer in q.quantized_layers()]
    half = q.to(torch.bfloat16)
    made = half(args[0].bfloat16(), args[1], args[2].bfloat16())
    assert made.dtype == torch.bfloat16 and made.isfinite().all()
    for layer, scale in zip(half.quantized_layers(), scales, strict=True):
        assert layer.act_scale.dtype == torch.float32 and torch.equal(layer.act_scale, scale)
        assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(
        copy.deepcopy(half)
        .float()
        .to(torch.bfloat16)(*[a.bfloat16() if a.is_floating_point() else a for a in args]),
        made,
    )


def test_a_model_goes_to_another_device(small):
    q = TimeStepCalibratedQuantModel(small.unet, k=2, split_shortcuts=True).to("meta")
    assert {t.device.type for t in q.state_dict().values()} == {"meta"}
    assert small.unet.out[2].weight.device.type == "cpu"


def test_subclasses_with_their_own_forward_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    q = QuantModel(
        nn.Sequential(Doubled(2, 2), nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 1)), act_quant_params=None
    )
    table = describe(q).set_index("name")
    assert [layer.name for layer in q.quantized_layers()] == ["1"]
    assert table.left_out.tolist() == [
        "neither nn.Conv2d nor nn.Linear",
        "",
        "neither nn.Conv2d nor nn.Linear",
    ]


def test_the_description_says_what_is_clipped():
    layer = nn.Linear(4000, 2, bias=False)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    for method in ("max", "mse"):
        q = QuantModel(layer, weight_quant_params={"n_bits": 3, "scale_method": method})
        row = describe(q).iloc[0]
        clip = 3 * q.quantized_layers()[0].weight_scale[:, None]
        expected = (layer.weight.abs() > clip * 1.000001).float().mean().item()
        assert row.weight_clipped == expected and (expected == 0) == (method == "max")
        assert (row.weight_bits, row.act_bits, row["shape"]) == (3, 8, (2, 4000))
        assert row.act_scale == "not calibrated" and row.kind == "Linear"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_what_they_say(tiny, name):
    q = build(name, tiny.unet, weight_bits=6, act_bits=5, timesteps=12, k=3)
    assert q.weight_quantizer.n_bits == 6
    assert (q.act_quantizer is None) == name.startswith("weights")
    assert q.act_quantizer is None or q.act_quantizer.n_bits == 5
    assert len(q.intervals) == (3 if name.startswith("timestep") else 1)
    assert bool(q.left_out) == name.endswith("filtered")
    assert q.split_shortcuts == (name == "timestep_split")
    chosen = name in ("timestep_optimal", "timestep_split")
    assert (getattr(q, "boundaries", "") == "optimal") == chosen
    assert ("mse" in name) <= (PRESETS[name].calibrator.get("act_scale_policy") == "mse")


def test_presets_are_overridden_and_unknown_ones_refused(small):
    q = build("mse_filtered", small.unet, quant_filters=["out"])
    assert set(q.left_out) == {"out.2"}
    with pytest.raises(ValueError, match="method must be one of weights_only, "):
        build("msee", small.unet)
    with pytest.raises(TypeError, match="quant_filter"):
        build("mse", small.unet, quant_filter=[])


def test_the_text_of_a_model_differs_wherever_its_results_do(small):
    # Caches of images tell models apart by their tensors and this text.
    texts = set()
    for bits in (8, 4):
        model = calibrated(QuantModel(small.unet, act_quant_params={"n_bits": bits}))
        for weights in (True, False):
            for activations in (True, False):
                texts.add(repr(model.set_use_quant(weights=weights, activations=activations)))
    # With activations off, their bits make no difference.
    assert len(texts) == 6
    assert "weights: 8 bits, activations: full precision" in " ".join(texts)


def test_a_later_override_gives_back_what_an_earlier_one_took():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overrides = {"*": {"act_quant_params": None}, "0": {"act_quant_params": {"n_bits": 6}}}
    q = QuantModel(module, overrides=overrides)
    first, second = (layer.act_quantizer for layer in q.quantized_layers())
    assert first.n_bits == 6 and second is None


def test_channel_wise_is_a_granularity_also_in_an_override():
    module = nn.Linear(4, 3)
    q = QuantModel(nn.Sequential(module), overrides={"0": {"weight_quant_params": {"channel_wise": False}}})
    assert q.quantized_layers()[0].weight_quantizer.granularity == "tensor"
    with pytest.raises(ValueError, match="channel_wise and granularity say the same"):
        QuantModel(module, weight_quant_params={"n_bits": 8, "granularity": "group", "channel_wise": False})


def test_a_set_of_overrides_goes_with_filters_that_leave_out_its_layers(small):
    q = build("low_bits", small.unet, 4, 8, quant_filters="published")
    assert "out" not in q.overrides and "*.attn2.to_k" in q.overrides
    with pytest.raises(UserError, match="override 'out' matches no quantized layer"):
        QuantModel(small.unet, quant_filters=["out"], overrides={"out": {"weight_quant_params": None}})


def test_bits_stay_those_of_build_where_other_arguments_take_a_presets_place():
    q = build("max", nn.Linear(32, 4), 4, 6, weight_quant_params={"granularity": "group", "group_size": 16})
    assert q.weight_quantizer.n_bits == 4 and q.act_quantizer.n_bits == 6
    named = Recipe("bits of its own do not count", weights={"n_bits": 2})
    assert build(named, nn.Linear(8, 8), 8, 8).weight_quantizer.n_bits == 8


def test_weights_that_a_hook_computes_are_refused():
    module = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(module[0], "weight", 0.5)
    with pytest.raises(UserError, match="weight of layer 0 is computed at each call"):
        QuantModel(module)
    prune.remove(module[0], "weight")
    assert QuantModel(module, act_quant_params=None)(torch.ones(1, 8)).isfinite().all()


class LinearSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.join = nn.Linear(16, 8)

    def shortcut_splits(self):
        return {"join": 8}


def test_halves_of_a_linear_layer_or_of_tokens_are_refused(small):
    with pytest.raises(UserError, match="layer join is no convolution"):
        QuantModel(LinearSkip(), split_shortcuts=True)
    with pytest.raises(ValueError, match="split_shortcuts and a scale for each token"):
        QuantModel(small.unet, split_shortcuts=True, act_quant_params={"n_bits": 8, "granularity": "token"})
