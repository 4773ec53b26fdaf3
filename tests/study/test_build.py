"""UNets of variants, against the package's own functions called by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from quantized_models import WEIGHT_BITS

import sdcomp
from sdcomp.errors import UserError
from sdcomp.pruning import (
    calibrate,
    count_zeros,
    n_m_budgets,
    patterns,
    prune_n_m,
    prune_structured,
    prune_unstructured,
    remove_cheapest,
    unstructured,
)
from sdcomp.quantization import PRESETS, Calibrator, QuantModel, TimeStepCalibratedQuantModel, quantize
from sdcomp.quantization.methods import SecondOrderRounding
from sdcomp.study import FP32, Builder, as_executed, calibration_settings, pruned, quantized
from sdcomp.study.requests import requested

CALIBRATION = {
    "prompts": ["a star"],
    "steps": 4,
    "sampler": "ddpm",
    "guidance_scale": 1.0,
    "seed": 3,
    "batch_size": 1,
}


@pytest.fixture
def run(tmp_path) -> SimpleNamespace:
    """Takes the place of a `Run`."""
    return SimpleNamespace(
        folder=tmp_path, id="0a1b", progress=False,
        parameters={"n_images": 1, "seed": 0, "calibration_prompts": "calibration"},
        generation=lambda sd: {"guidance_scale": 1.0, "batch_size": 2},
    )  # fmt: skip


@pytest.fixture
def call(small):
    generator = torch.Generator().manual_seed(0)
    config = small.config.unet
    latents = torch.randn(1, config.in_channels, 16, 16, generator=generator)
    context = torch.randn(1, 8, config.context_dim, generator=generator)

    @torch.no_grad()
    def called(unet):
        return unet(latents, 500, context)

    return called


def same_weights(one, other) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(map(torch.equal, *(s.values() for s in states)))


def test_a_study_prunes_as_the_package_does(run, small):
    builder = Builder(run, small)
    wanted = {
        FP32: small.unet,
        pruned("unstructured", 0.3): prune_unstructured(small.unet, 0.3),
        pruned("unstructured", 0.3, scope="global"): prune_unstructured(small.unet, 0.3, scope="global"),
        pruned("unstructured", 0.3, block="middle_block"): prune_unstructured(
            small.unet, 0.3, parts=["middle_block"]
        ),
        pruned("masked channels", 0.3): prune_structured(small.unet, 0.3),
        pruned("masked channels", 0.3, importance="l1"): prune_structured(small.unet, 0.3, n=1),
        pruned("removed", 0.3, importance="l1"): prune_structured(
            small.unet, 0.3, mode="remove", criterion="l1"
        ),
    }
    for variant, unet in wanted.items():
        assert same_weights(builder.build(variant), unet)
    assert builder.build(FP32) is small.unet


def test_data_dependent_importance_is_that_of_the_calibration(run, small):
    builder = Builder(run, small, CALIBRATION)
    data = calibrate(small.unet, lambda: small.generate(**CALIBRATION))
    unet, second = small.unet, {"importance": "second_order", "calibration": data}
    n = n_m_budgets(unet, 0.5, calibration=data)
    wanted = {
        "unstructured 0.5 wanda": prune_unstructured(unet, 0.5, importance="wanda", calibration=data),
        "unstructured 0.5 second_order": prune_unstructured(unet, 0.5, **second),
        "unstructured 0.5 gradient": prune_unstructured(unet, 0.5, importance="gradient", calibration=data),
        "unstructured 0.5 global second_order": prune_unstructured(unet, 0.5, "global", **second),
        "2:4": prune_n_m(unet),
        "2:4 second_order": prune_n_m(unet, **second),
        "2:4 global second_order": prune_n_m(unet, n, **second),
        "removed 0.3 second_order": prune_structured(unet, 0.3, mode="remove", **second),
        "removed 0.3 global second_order": remove_cheapest(unet, 0.3, data),
    }
    made = {text: builder.build(requested(text)) for text in wanted}
    for text, pruned_unet in wanted.items():
        assert same_weights(made[text], pruned_unet), text
    with pytest.raises(UserError, match="importance other than magnitude needs a calibration"):
        Builder(run, small).build(requested("2:4 wanda"))


def test_packed_weights_are_those_of_the_simulation(run, small, call):
    builder = Builder(run, small, CALIBRATION)
    variant = quantized("weights_gptq", 4, of=requested("unstructured 0.5"), execution="packed")
    packed = builder.build(variant)
    assert isinstance(packed, sdcomp.PackedModel)
    assert torch.equal(call(packed), call(builder.build(variant.simulation)))


def test_second_order_zeros_resume_from_the_runs_folder(run, small, tmp_path, monkeypatch):
    pruned_twice = [requested("unstructured 0.5 second_order"), requested("2:4 second_order recovered 1")]
    plain = unstructured.prune_layer

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for variant, module in zip(pruned_twice, (unstructured, patterns), strict=True):
        monkeypatch.setattr("sdcomp.checkpoints._EVERY", 0)
        calls = iter([plain, plain, killed])
        monkeypatch.setattr(module, "prune_layer", lambda *a, calls=calls, **k: next(calls)(*a, **k))
        with pytest.raises(KeyboardInterrupt):
            Builder(run, small, CALIBRATION).pruned(variant)
        monkeypatch.setattr(module, "prune_layer", plain)
    names = [f"{name}_by_second_order_{run.id}.ckpt" for name in ("2_4", "unstructured_50")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    Builder(run, small, CALIBRATION).pruned(pruned_twice[0])
    assert [path.name for path in tmp_path.iterdir()] == names[:1]


def test_a_recovery_is_kept_in_the_runs_folder_and_keeps_zeros(run, tmp_path):
    sd = sdcomp.load("data/tiny")
    builder = Builder(run, sd)
    plain, made = (builder.build(pruned("removed", 0.9, recover_steps=steps)) for steps in (0, 2))
    assert [path.name for path in tmp_path.iterdir()] == [f"removed_90_recovered_2_{run.id}.ckpt"]
    assert count_zeros(made).total == count_zeros(plain).total < count_zeros(sd.unet).total / 2
    assert not torch.equal(next(made.parameters()), next(plain.parameters()))


def test_a_study_quantizes_as_the_package_does(run, small, call):
    builder = Builder(run, small, CALIBRATION)
    sparse = prune_unstructured(small.unet, 0.3)
    bits = {"weight_quant_params": {"n_bits": 6}, "act_quant_params": {"n_bits": 5}}
    by_hand = TimeStepCalibratedQuantModel(sparse, timesteps=4, k=2, **bits)
    Calibrator(small, by_hand, act_scale_policy="mse").calibrate(**CALIBRATION)
    variant = quantized("timestep_mse", 6, 5, 2, of=pruned("unstructured", 0.3))
    assert torch.equal(call(builder.build(variant)), call(by_hand))
    assert not torch.equal(call(by_hand), call(sparse))
    integers = builder.build(replace(variant, execution="int8"))
    assert torch.equal(call(integers), call(sdcomp.to_int8(by_hand)))
    # The scales of the dense UNet, around the sparse one.
    dense = TimeStepCalibratedQuantModel(small.unet, timesteps=4, k=2, **bits)
    Calibrator(small, dense, act_scale_policy="mse").calibrate(**CALIBRATION)
    scales = {name: value for name, value in dense.state_dict().items() if "act_scale" in name}
    assert scales
    found = builder.build(replace(variant, calibrated_first=True)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in scales.items())
    assert not all(torch.equal(by_hand.state_dict()[name], value) for name, value in scales.items())


def test_a_model_that_is_calibrated_first_keeps_the_zeros_of_pruning(run, small):
    builder = Builder(run, small, CALIBRATION)
    variant = quantized("low_bits", 4, 4, of=pruned("unstructured", 0.5))
    sparse = builder.pruned(variant.unquantized)
    for layer in builder.build(replace(variant, calibrated_first=True)).quantized_layers():
        zeros = sparse.get_submodule(layer.name).weight == 0
        assert not layer.fake_weight()[zeros].any()


def test_openvino_runs_what_is_simulated(run, small, call):
    pytest.importorskip("openvino")
    builder = Builder(run, small, CALIBRATION)
    variant = quantized("mse", WEIGHT_BITS, 8, execution="openvino")
    simulated = call(builder.build(variant.simulation))
    exported = builder.build(variant)
    assert isinstance(exported, sdcomp.export.OpenVINOUNet) and variant.method == "mse + openvino"
    error = (call(exported) - simulated).square().mean() / simulated.square().mean()
    assert 0 < error < 10**-1.5  # these random weights turn the last bits into 27 dB


def test_32_bits_are_not_quantized(run, small, call):
    builder = Builder(run, small, CALIBRATION)
    weights = QuantModel(small.unet, weight_quant_params={"n_bits": 4}, act_quant_params=None)
    assert torch.equal(call(builder.build(quantized("max", 4, 32))), call(weights))
    assert torch.equal(call(builder.build(quantized("max", 32, 32))), call(small.unet))
    assert torch.equal(call(Builder(run, small).build(quantized("weights_only", 4))), call(weights))


def test_arguments_of_the_study_take_the_place_of_the_presets(run, small):
    changes = {"model": {"quant_filters": ["out"]}, "calibrator": {"act_update_policy": "momentum"}}
    builder = Builder(run, small, CALIBRATION, **changes, weights={"scale_method": "mse"})
    made = builder.build(quantized("max", 4, 8))
    assert (
        made.calibration["act_update_policy"] == "momentum" and made.calibration["act_scale_policy"] == "max"
    )
    assert made.weight_quantizer.scale_method == "mse" and made.weight_quantizer.n_bits == 4
    assert "out.2" not in {layer.name for layer in made.quantized_layers()}


def test_calibration_is_what_the_parameters_say(run):
    tiny = sdcomp.load("data/tiny")
    run.parameters |= {"n_calibration": 3, "calibration_steps": 7}
    assert len(calibration_settings(run, tiny, n=5)["prompts"]) == 5
    found = calibration_settings(run, tiny, negative_prompt="blue")
    assert len(found.pop("prompts")) == 3
    assert found == {
        "steps": 7, "sampler": "ddpm", "guidance_scale": 1.0, "negative_prompt": "blue",
        "batch_size": 2, "seed": 1, "progress": False,
    }  # fmt: skip


def test_a_variant_is_named_by_how_it_really_runs():
    int8 = quantized("mse", 8, 8, execution="int8")
    assert as_executed(int8, SimpleNamespace(execution="kernels")) == int8
    assert as_executed(FP32, SimpleNamespace()) == FP32
    slow = as_executed(int8, SimpleNamespace(execution="dequantized"))
    assert slow.label == "mse W8A8 int8 (dequantized)" and slow.simulation == int8.simulation


def test_the_methods_of_a_preset_are_applied(run, small, monkeypatch):
    rounding = replace(PRESETS["weights_only"], methods=[SecondOrderRounding(rows=64)])
    monkeypatch.setitem(PRESETS, "rounded", rounding)
    made = Builder(run, small, CALIBRATION).build(quantized("rounded", 4))
    by_hand = quantize(small, rounding, weight_bits=4, **CALIBRATION)
    nearest = Builder(run, small, CALIBRATION).build(quantized("weights_only", 4))
    weights = [[layer.fake_weight() for layer in m.quantized_layers()] for m in (made, by_hand, nearest)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_variants_whose_weights_are_rounded_alike_share_the_rounding(run, small):
    builder = Builder(run, small, CALIBRATION)
    first = builder.build(quantized("low_bits", 4, 8))
    assert not builder.rounding.reused
    for variant, alike in (
        (quantized("low_bits", 4, 4), True),
        (quantized("weights_gptq", 4), True),
        (quantized("timestep_low_bits", 4, 6, 2), True),
        (quantized("mse", 4, 4), False),
        (quantized("low_bits", 4, 32), True),
        (quantized("low_bits", 3, 8), False),
        (quantized("low_bits", 4, 8), False),
    ):
        made = builder.build(variant)
        assert builder.rounding.reused == alike, variant.label
        by_itself = Builder(run, small, CALIBRATION).build(variant)
        assert made.calibration == by_itself.calibration
        pairs = zip(made.quantized_layers(), by_itself.quantized_layers(), strict=True)
        for one, other in pairs:
            assert torch.equal(one.fake_weight(), other.fake_weight())
            assert one.act_scale is other.act_scale is None or torch.equal(one.act_scale, other.act_scale)
    assert all(layer.weight_integers is not None for layer in first.quantized_layers())


def test_a_study_may_name_recipes_of_its_own(run, small):
    own = replace(PRESETS["mse"], inputs={"symmetric": False})
    made = Builder(run, small, CALIBRATION, recipes={"affine": own}).build(quantized("affine", 8, 4))
    assert not made.act_quantizer.symmetric and made.act_quantizer.n_bits == 4
    assert made.calibration["act_scale_policy"] == "mse"
