"""Methods and recipes: what they do to layers, and what is left alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sdcomp
from sdcomp.errors import UserError
from sdcomp.moments import second_moments
from sdcomp.pruning import prune_unstructured
from sdcomp.quantization import (
    PRESETS,
    CalibrationError,
    Calibrator,
    QuantModel,
    Recipe,
    apply_recipe,
    build,
    load_quant_model,
    quantize,
    save_quant_model,
)
from sdcomp.quantization.methods import LowRankBranch, SecondOrderRounding

PROMPTS = ["a red star on a navy background", "a blue circle"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int) -> torch.Tensor:
    return random(rows, columns) @ random(columns, columns, seed=1)


def second_order(layer, x) -> None:
    q = layer.state
    SecondOrderRounding()(layer, second_moments(nn.Sequential(layer), ["0"], lambda: layer(x))["0"])
    assert q is layer.state


@pytest.mark.parametrize("params", [{}, {"symmetric": False}, {"granularity": "group", "group_size": 16}])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_second_order_rounding_keeps_outputs_closer_on_the_same_grids(kind, params):
    torch.manual_seed(0)
    if kind == "linear":
        module, x = nn.Linear(48, 20), correlated(400, 48)
    else:
        module, x = nn.Conv2d(6, 20, 3, padding=1), nn.functional.avg_pool2d(random(8, 6, 12, 12), 5, 1)
    q = QuantModel(module, weight_quant_params={"n_bits": 3, **params}, act_quant_params=None)
    (layer,) = q.quantized_layers()
    expected = module(x)
    nearest, grids = (q(x) - expected).square().mean(), layer.weight_grids()[0].scale.clone()
    second_order(layer, x)
    assert (q(x) - expected).square().mean() < 0.75 * nearest
    if not params.get("granularity"):
        assert torch.equal(layer.weight_grids()[0].scale, grids)
    # The rounded weight lies on the grids, and rounding it again changes nothing.
    fake = layer.fake_weight()
    assert torch.equal(layer.per_half(layer.weight_quantizer.simulate, fake), fake)
    assert torch.equal(layer.per_half(layer.weight_quantizer.dequantize, layer.integer_weight()), fake)
    # The full-precision layer is still there.
    assert torch.equal(q.set_use_quant(weights=False)(x), expected)


def test_halves_of_a_split_keep_their_own_grids(small):
    q = QuantModel(small.unet, weight_quant_params={"n_bits": 3}, act_quant_params=None, split_shortcuts=True)
    layer = next(layer for layer in q.quantized_layers() if layer.split is not None)
    x = random(2, layer.weight.shape[1], 8, 8)
    second_order(layer, x)
    halves = layer.fake_weight().split([layer.split, layer.weight.shape[1] - layer.split], dim=1)
    for half, scale in zip(halves, layer.weight_scale, strict=True):
        multiples = half.flatten(1) / scale[:, None]
        assert (multiples - multiples.round()).abs().max() < 1e-5 and multiples.abs().max() <= 3.001


def pruned(module: nn.Module, share: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.dim() > 1):
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < share] = 0
    return module


@pytest.mark.parametrize("params", [{}, {"symmetric": False}, {"granularity": "group", "group_size": 16}])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_zeros_stay_zero_and_the_others_make_up_for_them(kind, params):
    torch.manual_seed(0)
    if kind == "linear":
        module, x = pruned(nn.Linear(48, 20)), correlated(400, 48)
    else:
        module, x = (
            pruned(nn.Conv2d(6, 20, 3, padding=1)),
            nn.functional.avg_pool2d(random(8, 6, 12, 12), 5, 1),
        )
    q = QuantModel(module, weight_quant_params={"n_bits": 3, **params}, act_quant_params=None)
    (layer,) = q.quantized_layers()
    zeros, expected = layer.weight == 0, module(x)
    assert (layer.fake_weight()[zeros] == 0).all()
    nearest = (q(x) - expected).square().mean()
    second_order(layer, x)
    assert (layer.fake_weight()[zeros] == 0).all() and (layer.integer_weight()[zeros] == 0).all()
    assert (q(x) - expected).square().mean() < 0.8 * nearest


@pytest.mark.parametrize("preset", ["weights_only", "weights_gptq", "weights_gptq_groups", "low_bits"])
def test_a_pruned_model_keeps_its_zeros_whatever_the_recipe(small, preset):
    def run() -> None:
        small.generate(PROMPTS, steps=2)

    unet = prune_unstructured(small.unet, 0.5, importance="second_order", calibration=run)
    sd = small.replace(unet=unet)
    q = quantize(sd, preset, PROMPTS, weight_bits=4, act_bits=8, steps=2)
    for layer in q.quantized_layers():
        assert (layer.fake_weight()[unet.get_submodule(layer.name).weight == 0] == 0).all()


RECIPE = Recipe(
    "test",
    weights={"scale_method": "mse"},
    inputs={"symmetric": False},
    model={"overrides": "ends_at_8_bits"},
    calibrator={"act_scale_policy": "mse", "act_update_policy": "merged"},
    methods=(SecondOrderRounding(rows=256),),
)


def test_a_recipe_is_the_same_whatever_memory_it_has(small):
    made = [
        quantize(small, RECIPE, PROMPTS, weight_bits=4, act_bits=4, steps=2, memory=memory)
        for memory in (2**30, 100_000)
    ]
    states = [q.state_dict() for q in made]
    assert states[0].keys() == states[1].keys() and made[0].calibrated
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(name.endswith("weight_integers") for name in states[0])
    again = quantize(small, RECIPE, PROMPTS, weight_bits=4, act_bits=4, steps=2, memory=2**30)
    assert all(torch.equal(tensor, states[0][name]) for name, tensor in again.state_dict().items())


def test_prompts_are_one_text_or_any_series_of_texts(small):
    arguments = {"recipe": "max", "steps": 1}
    listed = quantize(small, prompts=PROMPTS, **arguments)
    drawn = quantize(small, prompts=(prompt for prompt in PROMPTS), **arguments)
    assert drawn.calibration == listed.calibration and drawn.calibration["prompts"] == 2
    assert all(torch.equal(tensor, drawn.state_dict()[name]) for name, tensor in listed.state_dict().items())
    assert quantize(small, prompts=PROMPTS[0], **arguments).calibration["prompts"] == 1
    with pytest.raises(ValueError, match="^calibration needs at least one prompt$"):
        quantize(small, prompts=[], **arguments)
    with pytest.raises(TypeError, match="^prompts must be text or a list of texts$"):
        quantize(small, prompts=None, **arguments)


def test_calibration_with_quantized_inputs_leaves_moments_and_memory_alone(randomize):
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
    module, x = randomize(nn.Sequential(*layers), 0), random(64, 16)
    recipe = replace(RECIPE, model={}, calibrator={"quantized_inputs": True})
    made = []
    for memory in (2**30, 1):
        model = build(recipe, module, 3, 3)
        apply_recipe(model, recipe, lambda model=model: model(x), memory=memory)
        made.append(model.state_dict())
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    # The methods see the inputs of the full-precision model.
    moments = second_moments(module, ["4"], lambda: module(x))["4"]
    (*_, last) = build(recipe, module, 3, 3).quantized_layers()
    recipe.methods[0](last, moments)
    assert torch.equal(last.weight_integers, made[0]["module.4.weight_integers"])


@pytest.mark.parametrize("method", [SecondOrderRounding(rows=256), LowRankBranch(2)])
def test_a_killed_quantization_goes_on_to_the_same_bits(small, tmp_path, monkeypatch, method):
    recipe = replace(RECIPE, methods=(method,))
    settings = {"weight_bits": 4, "act_bits": 4, "steps": 2}
    whole = quantize(small, recipe, PROMPTS, **settings)
    expected = whole.state_dict()
    file, rounded = tmp_path / "quantize.ckpt", []
    monkeypatch.setattr("sdcomp.checkpoints._EVERY", 0)
    plain = SecondOrderRounding.__call__

    def killed_at_the_tenth(self, layer, moments):
        rounded.append(layer.name)
        if len(rounded) == 10:
            raise KeyboardInterrupt
        plain(self, layer, moments)

    monkeypatch.setattr(SecondOrderRounding, "__call__", killed_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, recipe, PROMPTS, checkpoint=file, **settings)
    with pytest.raises(UserError, match="is of another quantization"):
        quantize(small, recipe, PROMPTS[:1], checkpoint=file, **settings)
    resumed = quantize(small, recipe, PROMPTS, checkpoint=file, **settings)
    # Nothing was rounded twice but the layer at which it was killed.
    assert len(rounded) == 1 + len(resumed.quantized_layers()) and not file.exists()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    assert resumed.calibration == whole.calibration
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no checkpoint of a quantization"):
        quantize(small, recipe, PROMPTS, checkpoint=file, **settings)


def test_settings_of_numpy_are_kept_in_a_checkpoint(randomize, tmp_path, monkeypatch):
    monkeypatch.setattr("sdcomp.checkpoints._EVERY", -1)
    module, x = randomize(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), 0), random(9, 16)
    calibrator = {"act_update_policy": "momentum", "momentum": np.float32(0.5)}
    recipe, file = replace(RECIPE, model={}, calibrator=calibrator), str(tmp_path / "quantize.ckpt")
    runs = []

    def run(model: QuantModel) -> None:
        if runs:
            raise KeyboardInterrupt
        runs.append(model(x))

    made = []
    for kill in (True, False):
        model = build(recipe, module, 4, 8)
        if kill:
            with pytest.raises(KeyboardInterrupt):
                apply_recipe(model, recipe, lambda model=model: run(model), memory=1, checkpoint=file)
        model = build(recipe, module, 4, 8)
        made.append(apply_recipe(model, recipe, lambda model=model: model(x), checkpoint=file))
    assert made[0].calibration == made[1].calibration and made[0].calibration["momentum"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in made), strict=True))


def test_a_recipe_runs_any_callable_once(small):
    q = QuantModel(small.unet, weight_quant_params={"n_bits": 4}, act_quant_params=None)
    calls = []

    def run() -> None:
        calls.append((q.state.weights, q.state.activations))
        small.replace(unet=q).generate(PROMPTS, steps=2)

    apply_recipe(q, Recipe("weights", methods=(SecondOrderRounding(rows=64),)), run)
    assert calls == [(False, False)] and q.state.weights and q.state.activations
    assert all(layer.weight_integers is not None for layer in q.quantized_layers())


def test_a_layer_that_does_not_run_is_named():
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    q = QuantModel(module, act_quant_params=None)
    with pytest.raises(UserError, match="unused did not run"):
        apply_recipe(q, Recipe("", methods=(SecondOrderRounding(),)), lambda: q.module["used"](random(3, 4)))


def test_saved_and_loaded_it_gives_the_same_images(small, tmp_path):
    q = quantize(small, RECIPE, PROMPTS, weight_bits=3, act_bits=6, steps=2)
    expected = small.replace(unet=q).generate(PROMPTS, steps=2)
    folder = sdcomp.save(small.replace(unet=q), tmp_path / "model")
    loaded = sdcomp.load(folder)
    assert torch.equal(loaded.generate(PROMPTS, steps=2), expected)
    assert loaded.unet.arguments() == q.arguments() and loaded.unet.calibration["methods"]
    again = load_quant_model(folder, small.unet)
    assert torch.equal(small.replace(unet=again).generate(PROMPTS, steps=2), expected)
    integers = loaded.unet.quantized_layers()[0].weight_integers
    assert integers is not None and integers.dtype == torch.int8


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_buffers_are_loaded_to_the_device_of_the_weights(randomize, tmp_path):
    module, x = randomize(nn.Sequential(nn.Linear(16, 8), nn.Conv2d(1, 4, 3)), 0), random(2, 1, 16, 16)
    recipe = replace(RECIPE, weights={}, model={}, methods=(LowRankBranch(2),))
    folder = save_quant_model(apply_recipe(q := build(recipe, module, 4), recipe, lambda: q(x)), tmp_path)
    loaded = load_quant_model(folder, copy.deepcopy(module).to("meta"))
    for layer, whole in zip(loaded.quantized_layers(), q.quantized_layers(), strict=True):
        buffers = dict(layer.named_buffers())
        assert buffers.keys() == dict(whole.named_buffers()).keys() > {"weight_integers", "branch_up"}
        assert all(buffer.is_meta for buffer in buffers.values())


def test_every_preset_is_a_recipe():
    assert all(isinstance(recipe, Recipe) and recipe.description for recipe in PRESETS.values())


def test_inference_mode_around_a_recipe_changes_nothing():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16)), torch.randn(8, 16)
    made = [build("weights_gptq", module, 4, overrides={}) for _ in range(2)]
    apply_recipe(made[0], "weights_gptq", lambda: made[0](x))
    with torch.inference_mode():
        apply_recipe(made[1], "weights_gptq", lambda: made[1](x))
    assert not made[1].quantized_layers()[0].weight_integers.is_inference()
    made[1].load_state_dict(made[0].state_dict())
    assert torch.equal(made[0](x), made[1](x))


def test_a_new_calibration_keeps_the_record_of_the_methods():
    module, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16)
    q = build("low_bits", module, 4, 8, overrides={})
    apply_recipe(q, "low_bits", lambda: q(x))
    before = q.calibration["methods"]
    Calibrator(None, q).observe(lambda: q(2 * x))
    assert q.calibration["methods"] == before and "SecondOrderRounding" in before[0]


def test_a_run_that_does_not_call_the_model_is_named():
    q = QuantModel(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(CalibrationError, match="the calibration did not call the model"):
        Calibrator(None, q).observe(lambda: None)
