"""Compressed models as folders: what is saved is what is loaded, bit for bit, also in a new process."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import sdcomp
from sdcomp.errors import UserError
from sdcomp.integer import Int8Model, PackedModel, to_int8
from sdcomp.pruning import prune_structured, prune_unstructured
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel

SETTINGS = {"steps": 3, "batch_size": 1, "seed": 5}
GROUPS = {"n_bits": 3, "granularity": "group", "group_size": 32}
PROMPTS = ["a small red star on a navy background"]


@pytest.fixture(scope="module")
def loaded(small, tmp_path_factory):
    """The small model, its weights laid out as loading does."""
    return sdcomp.load(sdcomp.save(small, tmp_path_factory.mktemp("small")))


def compressed(sd, how):
    unet = prune_structured(sd.unet, 0.3, mode="remove") if "removed" in how else sd.unet
    unet = prune_unstructured(unet, 0.2) if "zeroed" in how else unet
    if "quantized" in how or "int8" in how:
        unet = TimeStepCalibratedQuantModel(unet, timesteps=4, k=2, quant_filters=["time_embed"])
        Calibrator(sd, unet, act_scale_policy="mse").calibrate(PROMPTS, steps=4, batch_size=1)
    if "packed" in how:
        unet = sdcomp.to_packed(QuantModel(unet, weight_quant_params=GROUPS, act_quant_params=None))
    return sd.replace(unet=to_int8(unet) if "int8" in how else unet)


@pytest.mark.parametrize("removed", ["", "removed "])
@pytest.mark.parametrize("how", ["zeroed", "quantized", "int8", "packed"])
def test_a_saved_model_is_the_same_bit_for_bit(loaded, tmp_path, removed, how):
    sd = compressed(loaded, removed + how)
    folder = sdcomp.save(sd, tmp_path / "model", record={"prompt accuracy": 0.9})
    moved = folder.rename(tmp_path / "elsewhere")
    again = sdcomp.load(moved)
    assert type(again.unet) is type(sd.unet)
    assert torch.equal(again.generate(PROMPTS, **SETTINGS), sd.generate(PROMPTS, **SETTINGS))
    assert not torch.equal(again.generate(PROMPTS, **SETTINGS), loaded.generate(PROMPTS, **SETTINGS))
    about = json.loads((moved / "compression.json").read_text())
    assert about["record"] == {"prompt accuracy": 0.9} and about["unet"] == type(sd.unet).__name__
    (tmp_path / "any").touch()  # safetensors alone makes files that no others can read
    assert {file.stat().st_mode for file in moved.iterdir()} == {(tmp_path / "any").stat().st_mode}


def test_int8_takes_about_a_quarter_and_needs_no_other_weights(loaded, tmp_path):
    whole = sdcomp.save(loaded, tmp_path / "whole")
    less = sdcomp.save(compressed(loaded, "int8"), tmp_path / "int8")
    assert not (less / "unet.safetensors").exists()
    sizes = (less / "int8.safetensors").stat().st_size / (whole / "unet.safetensors").stat().st_size
    assert sizes < 0.45  # of a model this small, names and scales are a good part


def test_the_packed_format_packs_a_simulation(loaded, tmp_path):
    sd = compressed(loaded, "quantized")
    folder = sdcomp.save(sd, tmp_path / "packed", format="packed")
    again = sdcomp.load(folder)
    assert isinstance(again.unet, PackedModel) and isinstance(sd.unet, TimeStepCalibratedQuantModel)
    assert torch.equal(again.generate(PROMPTS, **SETTINGS), sd.generate(PROMPTS, **SETTINGS))
    assert not (folder / "unet.safetensors").exists() and not (folder / "quantization.json").exists()
    packed = sdcomp.save(again, tmp_path / "again", format="packed")
    files = ("packed.json", "packed.safetensors", "compression.json")
    assert all((packed / name).read_bytes() == (folder / name).read_bytes() for name in files)
    with pytest.raises(sdcomp.ModelError, match="the packed format holds quantized UNets"):
        sdcomp.save(loaded, tmp_path / "plain", format="packed")
    with pytest.raises(UserError, match="holds no int8 model"):
        sdcomp.load(folder, execution="kernels")


def test_a_packed_model_computes_in_the_type_that_is_asked_for(loaded, tmp_path):
    folder = sdcomp.save(compressed(loaded, "packed"), tmp_path)
    sd = sdcomp.load(folder, dtype=torch.bfloat16)
    assert sd.unet.dtype is torch.bfloat16
    assert sd.generate(PROMPTS, **SETTINGS).isfinite().all()
    assert sdcomp.load(folder, dtype=None).unet.dtype is torch.float32
    assert sdcomp.load(folder, device="meta").unet.out[2].packed_weight.is_meta


@pytest.mark.parametrize("how", ["packed", "int8"])
def test_a_folder_used_again_is_of_the_last_model(loaded, tmp_path, how):
    sdcomp.save(compressed(loaded, how), tmp_path)
    assert isinstance(sdcomp.load(tmp_path).unet, Int8Model if how == "int8" else PackedModel)
    sdcomp.save(loaded, tmp_path)
    assert type(sdcomp.load(tmp_path).unet) is type(loaded.unet)
    sdcomp.save(loaded, tmp_path)
    assert not (tmp_path / "compression.json").exists()


def test_the_record_of_a_packed_model(loaded, tmp_path):
    folder = sdcomp.save(compressed(loaded, "quantized"), tmp_path, format="packed")
    about = json.loads((folder / "compression.json").read_text())
    assert about["unet"] == "PackedModel" and about["quantization"] == {
        "weight_bits": 8,
        "act_bits": 8,
        "intervals": [[0, 499], [500, 999]],
        "left_out": ["time_embed.0", "time_embed.2"],
    }


@pytest.mark.parametrize("how", ["quantized", "removed int8"])
def test_the_record_says_how_the_model_is_quantized(loaded, tmp_path, how):
    folder = sdcomp.save(compressed(loaded, how), tmp_path / "model")
    assert json.loads((folder / "compression.json").read_text())["quantization"] == {
        "weight_bits": 8,
        "act_bits": 8,
        "intervals": [[0, 499], [500, 999]],
        "left_out": ["time_embed.0", "time_embed.2"],
    }
    folder = sdcomp.save(loaded, tmp_path / "plain")
    assert not (folder / "compression.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zeroed quantized", "removed int8", "removed packed"])
def test_a_new_process_draws_the_same_image_from_a_copy_alone(loaded, tmp_path, how):
    sd = compressed(loaded, how)
    folder = sdcomp.save(sd, tmp_path / "model")
    copy = shutil.copytree(folder, tmp_path / "far" / "away")
    shutil.rmtree(folder)
    script = (
        "import sys, torch, sdcomp; torch.set_num_threads(int(sys.argv[2]));"
        f"images = sdcomp.load(sys.argv[1]).generate({PROMPTS!r}, **{SETTINGS!r});"
        "torch.save(images, sys.argv[1] + '/images.pt')"
    )
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", script, str(copy), threads], check=True, cwd=copy.parent)
    assert torch.equal(torch.load(copy / "images.pt"), sd.generate(PROMPTS, **SETTINGS))
