"""Compressed models as folders: what is saved is what is loaded, bit for bit, also in a new process."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import sdcomp
from sdcomp import files
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


WRITERS = {
    "zeroed": sdcomp.save,
    "removed": sdcomp.save,
    "quantized": sdcomp.save,
    "int8": sdcomp.save,
    "packed": sdcomp.save,
    "diffusers": partial(sdcomp.save, format="diffusers"),
    "removed diffusers": partial(sdcomp.export, format="diffusers"),
    "zeroed checkpoint": partial(sdcomp.export, format="checkpoint"),
}
PAIRS = list(itertools.product(WRITERS, repeat=2))
KILLED = [
    ("zeroed", "quantized"), ("int8", "zeroed"), ("quantized", "int8"), ("quantized", "diffusers"),
    ("diffusers", "packed"), ("removed", "zeroed checkpoint"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """Models of all kinds: how each is written, a folder that tests must not change, and what it loads as."""
    found = {}
    for kind, write in WRITERS.items():
        sd, folder = compressed(loaded, kind), tmp_path_factory.mktemp("made") / "model"
        write(sd, folder)
        found[kind] = partial(write, sd), folder, identity(folder)
    return found


def identity(folder):
    """The UNet and the decoder that a folder loads as; the words of a refusal."""
    try:
        if (folder / "unet" / "unet_channels.json").exists():
            pytest.importorskip("diffusers")
            pipe = sdcomp.export.load_diffusers(folder)
            return "pipeline", sdcomp.model.weights_digest(pipe.unet), sdcomp.model.weights_digest(pipe.vae)
        sd = sdcomp.load(folder)
    except UserError as error:
        return str(error)
    return type(sd.unet).__name__, *map(sdcomp.model.weights_digest, (sd.unet, sd.decoder))


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_folder_of_any_format_used_again_loads_as_the_last_model(made, tmp_path, old, new):
    folder = Path(shutil.copytree(made[old][1], tmp_path / "model", copy_function=os.link))
    write, _, expected = made[new]
    write(folder)
    assert identity(folder) == expected and len(expected) == 3


@pytest.mark.parametrize("how", ["zeroed", "quantized", "packed", "diffusers", "removed diffusers"])
def test_a_type_that_cannot_be_loaded_leaves_the_old_model(made, tmp_path, how):
    write, folder, same = made[how]
    copy = shutil.copytree(folder, tmp_path / "old")
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float16"):
        for target in (copy, tmp_path / "new"):
            with pytest.raises(TypeError, match=f"dtype must be a floating-point type.* not '?{dtype}"):
                write(target, dtype=dtype)
    assert identity(copy) == same and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("old", "new"), KILLED)
def test_a_save_that_is_killed_anywhere_mixes_no_models(made, tmp_path, old, new, monkeypatch):
    """Killed before each file that is written, before each that is removed, and before each renaming."""
    left = 0

    def killing(function):
        def step(path, *args, **kwargs):
            nonlocal left
            left -= Path(path).exists()  # removing a file that is not there changes nothing
            if left < 0:
                raise KeyboardInterrupt
            return function(path, *args, **kwargs)

        return step

    monkeypatch.setattr(files, "_remove_leftovers", killing(files._remove_leftovers))
    monkeypatch.setattr(files.os, "replace", killing(os.replace))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink))
    write, _, after = made[new]
    before, outcomes = made[old][2], []
    for steps in itertools.count():
        folder = Path(shutil.copytree(made[old][1], tmp_path / str(steps), copy_function=os.link))
        left = steps
        try:
            write(folder)
        except KeyboardInterrupt:
            left = 10**6
            outcomes.append(identity(folder))
        else:
            break
    refused = [words for words in outcomes if words not in (before, after)]
    assert refused and all(re.search(r"save (or copy it )?again$", str(words)) for words in refused)
    assert outcomes.count(before) > 5  # nothing is lost while the new files are written
    left = 10**6
    write(Path(tmp_path / str(steps - 3)))
    assert identity(tmp_path / str(steps - 3)) == identity(folder) == after


@pytest.mark.parametrize("how", ["quantized", "int8", "packed"])
def test_a_folder_without_the_quantized_unet_of_its_record_is_refused(loaded, tmp_path, how):
    folder = sdcomp.save(compressed(loaded, how), tmp_path)
    for name in ("quantization", "int8", "packed"):
        for file in folder.glob(f"{name}.*"):
            file.unlink()
    shutil.copy(sdcomp.save(loaded, tmp_path / "plain") / "unet.safetensors", folder)
    with pytest.raises(
        sdcomp.ModelError, match=r"has no \w+\.json, but its UNet is .* save or copy it again$"
    ):
        sdcomp.load(folder)
    (folder / "compression.json").write_text("[]")
    with pytest.raises(sdcomp.ModelError, match=r"compression\.json is damaged"):
        sdcomp.load(folder)


def test_what_cannot_be_saved_or_loaded_is_refused_first(loaded, tmp_path):
    with pytest.raises(sdcomp.ModelError, match="the original format holds plain models without a record"):
        sdcomp.save(loaded, tmp_path / "model.safetensors", record={"a": 1})
    with pytest.raises(TypeError, match="JSON"):
        sdcomp.save(loaded, tmp_path / "model", record={"a": object()})
    assert not list(tmp_path.iterdir())
    for how in ("packed", "int8"):
        folder = sdcomp.save(compressed(loaded, how), tmp_path / how)
        with pytest.raises(sdcomp.ModelError, match="has its own UNet in integers: leave unet out"):
            sdcomp.load(folder, unet=loaded.unet)
        assert type(sdcomp.load(folder, unet=None).unet) is type(compressed(loaded, how).unet)


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
