"""The rules of each study: they cover its notebook, and what breaks one stops the run with a sentence."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from notebook_parameters import NOTEBOOKS, namespace, parameters_cell

from sdcomp.study import ParameterError, read_parameters
from sdcomp.study.parameter_rules import STUDIES, common

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "model", "dtype", "batch_size", "seed", "n_images", "steps", "sampler", "guidance_scale", "device", "out",
}  # fmt: skip


@pytest.mark.parametrize("study", NOTEBOOKS)
def test_a_notebook_and_its_rules_have_the_same_parameters(study):
    source = parameters_cell(study)
    declared = [node.target.id for node in ast.parse(source).body]
    assert len(set(declared)) == len(declared) and set(declared) == set(STUDIES[study].rules)
    # Each line says what it is for.
    assert all("  # " in line for line in source.splitlines())
    if study == "05_claims":
        assert COMMON & set(declared) == {"model", "n_images", "out"}  # nothing is generated there
    else:
        assert set(declared) >= COMMON


def test_every_notebook_has_rules():
    assert set(NOTEBOOKS) == set(STUDIES)


@pytest.mark.parametrize("study", NOTEBOOKS)
def test_the_defaults_and_the_profile_of_each_notebook_pass(study):
    values = read_parameters(namespace(study), study)
    assert values == {name: namespace(study)[name] for name in values}
    injected = yaml.safe_load((ROOT / "notebooks" / "profiles" / f"{study}.yaml").read_text(encoding="utf-8"))
    found = read_parameters(namespace(study, **injected), study)
    assert {name: found[name] for name in injected} == injected


@pytest.mark.parametrize(
    ("profile", "study", "name", "value"),
    [("published", "01_quantization", "k", 10), ("training", "00_base_model", "unet_steps", 14600)],
)
def test_the_other_profiles_pass(profile, study, name, value):
    injected = yaml.safe_load((ROOT / f"notebooks/profiles/{profile}.yaml").read_text(encoding="utf-8"))
    assert read_parameters(namespace(study, **injected), study)[name] == value


SD15 = sorted((ROOT / "notebooks" / "profiles" / "sd15").glob("*.yaml"))


@pytest.mark.parametrize("profile", SD15, ids=lambda path: path.stem)
def test_the_profiles_of_stable_diffusion_pass(profile):
    text = profile.read_text(encoding="utf-8")
    injected = yaml.safe_load(text)
    if profile.stem == "05_claims":
        injected["reports"] = "reports"  # the folder is made by the other studies
    found = read_parameters(namespace(profile.stem, **injected), profile.stem)
    assert {name: found[name] for name in injected} == injected
    assert injected["model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    # Where they are not measured, they say so.
    assert profile.stem == "05_claims" or "Estimates, not measured." in text
    assert injected.get("n_images", 0) <= 256 and injected.get("n_calibration", 0) <= 128


QUANTIZATION, PRUNING, PROFILING, COMBINED = "01_quantization", "02_pruning", "03_profiling", "04_combined"
LOW_BITS, CONDITIONS = "06_low_bits", "07_conditions"
BAD = [
    ("00_base_model", {"train_images": 257}, "train_images must be a multiple of 4"),
    ("00_base_model", {"n_images": 257}, "n_images must be between 1 and 256"),
    ("00_base_model", {"save_to": "/proc/1/cmdline/x"}, "save_to must be a folder that exists or can be"),
    ("00_base_model", {"checkpoints": "x" * 300}, "checkpoints must be a folder"),
    (QUANTIZATION, {"weight_bits": 6.5}, "weight_bits must be a whole number"),
    (QUANTIZATION, {"weight_bits": [6.5], "act_bits": [6]}, "weight_bits must be a list of whole numbers"),
    (QUANTIZATION, {"weight_bits": [8, 6], "act_bits": [8, 6, 5]}, "lists of one length, not of 2 and 3"),
    (QUANTIZATION, {"sweep_bits": [4.5]}, "sweep_bits must be a list of whole numbers, not of 4.5"),
    (QUANTIZATION, {"sweep_bits": [9]}, "sweep_bits must be between 2 and 8"),
    (QUANTIZATION, {"sweep_bits": [8]}, "sweep_bits needs sweep_methods"),
    (QUANTIZATION, {"sweep_methods": ["max"]}, "sweep_methods needs sweep_bits"),
    (QUANTIZATION, {"sweep_k": [2.5]}, "sweep_k must be a list of whole numbers"),
    (QUANTIZATION, {"sweep_k": [0]}, "sweep_k must be between 1"),
    (QUANTIZATION, {"sweep_k": [5, 41]}, "sweep_k must be at most calibration_steps, 40, not 41"),
    (QUANTIZATION, {"k": 50}, "k must be at most calibration_steps, 40, not 50"),
    (QUANTIZATION, {"methods": []}, "methods must not be an empty list"),
    (QUANTIZATION, {"methods": ["max", "max"]}, "methods must name each of its values once"),
    (QUANTIZATION, {"methods": "max"}, "methods must be a list of texts, not 'max'"),
    (QUANTIZATION, {"quant_filters": [""]}, "quant_filters must be names of layers"),
    (QUANTIZATION, {"calibrate": False}, "set quantize_activations to false too"),
    (QUANTIZATION, {"strength": 0.0}, "strength must be above 0 and at most 1"),
    (QUANTIZATION, {"image": "nowhere.png"}, "image must be an existing image file"),
    (QUANTIZATION, {"image": "data"}, "image must be an existing image file"),
    (QUANTIZATION, {"model": "data/tinny"}, "model must be an existing model folder or file"),
    (QUANTIZATION, {"model": "owner/a.safetensors"}, "model must be an existing model folder or file"),
    (QUANTIZATION, {"prompts": "tset"}, "prompts must be test, final, unseen, calibration, or an existing"),
    (QUANTIZATION, {"calibration_prompts": "mine.txt"}, "calibration_prompts must be test, final"),
    (QUANTIZATION, {"reference": "data/prompts"}, "reference must be an image, or a folder with PNG"),
    (QUANTIZATION, {"clip_model": "no such clip"}, "clip_model must be a folder with a CLIP"),
    (QUANTIZATION, {"act_scale_policy": "min"}, "act_scale_policy must be one of max, mse, empty"),
    (PRUNING, {"mode": "remove"}, "mode='remove' removes channels: set structured to true"),
    (PRUNING, {"variants": ["unstructured"]}, "variants must be pruned variants, such as 'unstructured 0.5"),
    (PRUNING, {"variants": ["2:4", "2:4"]}, "variants must name each of its values once"),
    (PRUNING, {"recover_steps": 10, "dtype": "float16"}, "recovery trains in float32, not float16"),
    (PRUNING, {"variants": ["2:4 recovered 9"], "dtype": "bfloat16"}, "trains in float32, not bfloat16"),
    (PRUNING, {"sensitivity_amounts": [0.3], "noise_images": 0}, "set noise_images above 0"),
    (PRUNING, {"timing_repeats": 0}, "timing_repeats must be between 1"),
    (PROFILING, {"repeats": 0}, "repeats must be between 1"),
    (PROFILING, {"amounts": [1.5]}, "amounts must be a fraction from 0 to below 1"),
    (PROFILING, {"amounts": []}, "amounts must not be an empty list"),
    (PROFILING, {"amounts": [0.2, 0.2]}, "amounts must name each of its values once"),
    (PROFILING, {"components": ["unet"]}, "components must be one of text encoder, UNet, decoder"),
    (PROFILING, {"backends": ["cuda"]}, "backends must be one of fp32, simulated, int8"),
    (COMBINED, {"k": 30}, "k must be at most calibration_steps, 10, not 30"),
    (COMBINED, {"k": 30, "method": "mse"}, "k must be at most calibration_steps"),  # int8 needs it
    (COMBINED, {"packed_bits": [9]}, "packed_bits must be between 2 and 8"),
    (COMBINED, {"confirm_prompts": "test"}, "confirm_prompts='test' is used already"),
    (COMBINED, {"confirm_prompts": "calibration"}, "confirm_prompts='calibration' is used already"),
    (COMBINED, {"tolerance": "much"}, "tolerance must be between 0 and 100, or empty"),
    (COMBINED, {"packed_bits": [4, 4]}, "packed_bits must name each of its values once"),
    (COMBINED, {"method": "weights_only"}, "int8 quantizes activations, and method='weights_only' does not"),
    (COMBINED, {"method": "weights_only", "backends": ["openvino"]}, "remove openvino from backends"),
    (COMBINED, {"k": 30, "method": "mse", "backends": ["openvino"]}, "k must be at most calibration_steps"),
    (COMBINED, {"weight_bits": [8, 6], "act_bits": [8, 6, 5]}, "lists of one length"),
    (COMBINED, {"budgets": [0.0]}, "budgets must be shares of the fp16 bytes"),
    (COMBINED, {"variants": ["removed 0.1 recovered 9"], "dtype": "float16"}, "recovery trains in float32"),
    (LOW_BITS, {"act_bits": [9]}, "act_bits must be between 2 and 8, or 32"),
    (LOW_BITS, {"act_bits": [4, 32]}, "the last of act_bits is that of the ladder"),
    (LOW_BITS, {"act_bits": [4, 4]}, "act_bits must name each of its values once"),
    (LOW_BITS, {"weight_bits": []}, "weight_bits must not be an empty list"),
    (LOW_BITS, {"methods": ["weights_gptq"], "act_bits": [4]}, "weights_gptq leaves activations in full"),
    (LOW_BITS, {"ladder": ["gptq"]}, "ladder must be one of symmetric, affine"),
    (LOW_BITS, {"norms": [0.5]}, "norms must be exponents between 1 and 16, or 0"),
    (LOW_BITS, {"k": 21}, "k must be at most steps, 20, not 21"),
    (LOW_BITS, {"sensitivity_layers": -1}, "sensitivity_layers must be between 0"),
    (CONDITIONS, {"preset": "weights_only"}, "preset must be one of max, "),
    (CONDITIONS, {"preset": "timestep_mse", "k": 21}, "k must be at most steps, 20, not 21"),
    (CONDITIONS, {"bits": []}, "bits must not be an empty list"),
    (CONDITIONS, {"conditions": ["10"]}, "conditions must be conditions, such as 'ddpm', '10 steps'"),
    (CONDITIONS, {"conditions": ["0 steps"]}, "conditions must be conditions, such as"),
    (CONDITIONS, {"conditions": ["guidance 101"]}, "conditions must be conditions, such as"),
    (CONDITIONS, {"conditions": ["ddpm", "ddpm"]}, "conditions must name each of its values once"),
    (CONDITIONS, {"policies": ["min"]}, "policies must be one of max, mse, maximum, momentum, merged"),
    (CONDITIONS, {"pruned": []}, "pruned must not be an empty list"),
    (CONDITIONS, {"pruned": ["2:4 recovered 9"], "dtype": "float16"}, "trains in float32, not float16"),
    (CONDITIONS, {"draws": 0}, "draws must be between 1"),
    ("05_claims", {"reports": "README.md"}, "reports must be an existing folder"),
    ("05_claims", {"score": "FID"}, "score must be one of prompt accuracy, CLIP score"),
    ("05_claims", {"seed": 1}, "there is no parameter 'seed'"),
]  # fmt: skip


@pytest.mark.parametrize(("study", "injected", "words"), BAD, ids=lambda value: str(value)[:40])
def test_what_breaks_a_rule_is_refused_in_one_sentence(study, injected, words):
    with pytest.raises(ParameterError) as caught:
        read_parameters(namespace(study, **injected), study)
    assert words in str(caught.value) and "\n" not in str(caught.value)


GOOD = [
    (QUANTIZATION, {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"}),
    (QUANTIZATION, {"weight_bits": [8, 6], "act_bits": 4}),
    (QUANTIZATION, {"weight_bits": [8, 6], "act_bits": [4]}),
    (QUANTIZATION, {"k": 50, "methods": ["max", "weights_only"]}),
    (QUANTIZATION, {"calibrate": False, "quantize_activations": False}),
    (QUANTIZATION, {"clip_model": "openai/clip-vit-base-patch32", "quant_filters": ["*.to_v"]}),
    (QUANTIZATION, {"prompts": "data/prompts/scenes_test.jsonl", "guidance_scale": 2}),
    (PRUNING, {"mode": "remove", "structured": True, "amount": [0.1, 0]}),
    (PRUNING, {"dtype": "bfloat16", "batch_size": 4}),
    (COMBINED, {"k": 30, "method": "mse", "variants": ["2:4 second_order"]}),
    (PRUNING, {"variants": ["masked 0.05", "removed 0.45 global second_order recovered 400"]}),
    (COMBINED, {"method": "weights_only", "backends": ["simulated"]}),
    (LOW_BITS, {"methods": ["low_bits", "weights_gptq_groups"], "norms": [], "ladder": []}),
    (LOW_BITS, {"k": 21, "norms": []}),
    (LOW_BITS, {"act_bits": [4], "norms": [1.0, 0.0]}),
    (CONDITIONS, {"preset": "low_bits", "k": 21, "policies": [], "calibration_samplers": []}),
    (CONDITIONS, {"conditions": ["dpmpp_2m 10 steps guidance 2.5"], "calibration_sizes": [256]}),
]


@pytest.mark.parametrize(("study", "injected"), GOOD, ids=lambda value: str(value)[:40])
def test_what_goes_together_is_taken(study, injected):
    found = read_parameters(namespace(study, **injected), study)
    assert {name: found[name] for name in injected} == injected


@pytest.mark.parametrize("study", [PROFILING, COMBINED])
def test_a_backend_that_is_not_installed_is_refused_in_one_sentence(monkeypatch, study):
    injected = {"backends": ["int8", "openvino"]}
    monkeypatch.setattr(common, "find_spec", lambda name: object())
    assert read_parameters(namespace(study, **injected), study)["backends"] == injected["backends"]
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match=r"not installed: pip install -e '\.\[deploy\]', or remove it"):
        read_parameters(namespace(study, **injected), study)
