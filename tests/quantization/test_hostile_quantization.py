"""Files of quantized models: settings and values that cannot be are refused, each in a sentence."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdcomp
from sdcomp.errors import UserError
from sdcomp.integer import to_int8
from sdcomp.quantization import Calibrator, TimeStepCalibratedQuantModel

PROMPTS = ["a small red star"]


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> dict[str, Path]:
    """Good folders, of the simulation and of the integers; nobody writes into them."""
    q = TimeStepCalibratedQuantModel(small.unet, timesteps=4, k=2, split_shortcuts=True)
    Calibrator(small, q).calibrate(PROMPTS, steps=4, batch_size=1)
    folder = tmp_path_factory.mktemp("quantized")
    small = small.replace(config=dataclasses.replace(small.config, vision=None, reader=False))
    return {
        "quantization": sdcomp.save(small.replace(unet=q), folder / "quantization"),
        "int8": sdcomp.save(small.replace(unet=to_int8(q)), folder / "int8"),
    }


@pytest.fixture
def broken(saved, tmp_path):
    """A function that copies a good folder, to replace its files."""
    return lambda kind: Path(shutil.copytree(saved[kind], tmp_path / kind, copy_function=os.link))


def refused(folder: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        sdcomp.load(folder)
    message = str(caught.value)
    assert str(folder / name) in message and message.isprintable() and len(message) < 600
    return message


SETTINGS = [
    ("int8", "act_bits", 8.0, "a whole number from 2 to 8"),
    ("int8", "weight_bits", True, "a whole number"),
    ("int8", "dtype", "float64", "'float32' or 'bfloat16'"),
    ("int8", "starts", [], "a list"),
    ("int8", "starts", [5, 500], "the first 0"),
    ("int8", "starts", [0, 0], "ascending"),
    ("int8", "starts", [0, 1000], "from 0 to 999"),
    ("int8", "train_timesteps", 1e3, "a whole number"),
    ("int8", "train_timesteps", 600, "config.json has 1000"),
    ("int8", "timestep_arg", -1, "a whole number from 0"),
    ("int8", "timestep_arg", 0, "must be 1 or 'timesteps'"),
    ("int8", "timestep_arg", "t", "must be 1 or 'timesteps'"),
    ("int8", "splits", {"out.2": 0}, "a whole number from 1"),
    ("int8", "unet.norm_groups", 0, "unet: norm_groups is 0"),
    ("int8", "unet.num_heads", 4, "another UNet than config.json"),
    ("int8", "channels", {"nowhere": [1]}, "no group 'nowhere'"),
    ("quantization", "kind", "os.system", "'QuantModel' or 'TimeStepCalibratedQuantModel'"),
    ("quantization", "arguments.k", 2.0, "arguments: k is 2.0"),
    ("quantization", "arguments.k", 10**9, "a whole number from 1 to 1000"),
    ("quantization", "arguments.act_quant_params.n_bits", "8", "act_quant_params: n_bits is '8'"),
    ("quantization", "arguments.act_quant_params.clip", 3, "no setting 'clip'"),
    ("quantization", "arguments.weight_quant_params", 8, "a table"),
    ("quantization", "arguments.quant_filters", "*", "a list"),
    ("quantization", "arguments.timestep_arg", 2, "must be 1 or 'timesteps'"),
    ("quantization", "arguments.train_timesteps", 600, "config.json has 1000"),
    ("quantization", "use_quant.weights", 1, "use_quant: weights is 1"),
    ("quantization", "calibration", [], "a table"),
]


@pytest.mark.parametrize(("kind", "name", "value", "words"), SETTINGS)
def test_a_setting_that_cannot_be_is_named(broken, kind, name, value, words):
    folder = broken(kind)
    file = folder / f"{kind}.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    *path, last = name.split(".")
    table = settings
    for step in path:
        table = table[step]
    table[last] = value
    file.unlink()
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert words in refused(folder, file.name)


TENSORS = [
    ("quantization", "module.out.2.act_scale", float("nan")),
    ("quantization", "module.out.2.act_scale", -1.0),
    ("quantization", "module.out.2.weight_scale", 0.0),
    ("quantization", "module.out.2.weight_scale", float("inf")),
    ("quantization", "module.out.2.act_clipped", float("nan")),
    ("quantization", "interval_starts", 7),
    ("int8", "out.2.bias", float("nan")),
    ("int8", "out.2.weight_scale", 0.0),
    ("int8", "out.2.act_scale", -1.0),
    ("int8", "out.0.weight", float("inf")),
]


@pytest.mark.parametrize(("kind", "name", "value"), TENSORS)
def test_a_value_that_cannot_be_is_refused_with_its_tensor(broken, kind, name, value):
    folder = broken(kind)
    file = folder / f"{kind}.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(file).items()}
    state[name].view(-1)[0] = value
    file.unlink()
    save_file(state, file)
    message = refused(folder, file.name)
    assert "is damaged" in message and (name in message or name.rpartition(".")[0] in message)


def test_tensors_of_another_type_are_refused(broken):
    for kind, name, dtype in (
        ("quantization", "module.out.2.act_scale", torch.float64),
        ("int8", "out.0.weight", torch.float16),
        ("int8", "out.2.bias", torch.float64),
    ):
        folder = broken(kind)
        file = folder / f"{kind}.safetensors"
        state = {key: tensor.clone() for key, tensor in load_file(file).items()}
        file.unlink()
        save_file({**state, name: state[name].to(dtype)}, file)
        assert "another module" in refused(folder, file.name)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["quantization", "int8"])
@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_a_model_that_lacks_one_of_its_two_files_is_not_taken_for_a_plain_one(broken, kind, end):
    folder = broken(kind)
    (folder / f"{kind}.{end}").unlink()
    with pytest.raises(UserError, match=rf"it has no {kind}\.{end}"):
        sdcomp.load(folder)
