"""Configurations: impossible values are refused before anything is built, possible ones are not."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sdcomp.errors import UserError
from sdcomp.model.config import SD15, TINY, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from sdcomp.model.device import check_device
from sdcomp.model.schedule import NoiseSchedule
from sdcomp.settings import FLAG, AnyOf, ListOf, Number, OneOf, TableOf, Text, Whole

TEXT, VISION = TINY.text, TINY.vision
ROOT = Path(__file__).resolve().parents[2]


def with_(part: str, **changes: object) -> dict:
    """The tiny model's settings as JSON gives them, with some settings of a part changed."""
    values = json.loads(json.dumps(TINY.to_dict()))
    (values if part == "model" else values[part]).update(changes)
    return values


@pytest.mark.parametrize("config", [SD15, TINY])
def test_configurations_come_back_from_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_shipped_model_passes_and_so_do_relatives_of_other_sizes():
    ModelConfig.from_dict(json.loads((ROOT / "data" / "tiny" / "config.json").read_text(encoding="utf-8")))
    # The UNets of Stable Diffusion 2 and SDXL, as far as our configuration goes, and longer schedules.
    UNetConfig(context_dim=1024, num_heads=20)
    UNetConfig(channel_mult=(1, 2, 4), transformer_depth=10, context_dim=2048, num_heads=10, num_res_blocks=2)
    UNetConfig(in_channels=9, channel_mult=(1, 3), attention_levels=())
    VAEConfig(z_channels=16, latent_scale=0.3611)
    ScheduleConfig(train_timesteps=4000, beta_end=0.008)
    ScheduleConfig(0.0001, 0.02)
    dataclasses.replace(SD15, image_size=4096)


WRONG = [
    ("unet", "num_heads", 0, "a whole number from 1"),
    ("unet", "num_heads", 5, "must divide the width"),
    ("unet", "num_heads", True, "a whole number"),
    ("unet", "norm_groups", 0, "a whole number from 1"),
    ("unet", "norm_groups", 9, "must divide the width 48"),
    ("unet", "model_channels", 48.0, "a whole number"),
    ("unet", "model_channels", "48", "a whole number"),
    ("unet", "model_channels", 2**40, "to 65536"),
    ("unet", "transformer_depth", 20_000, "to 64"),
    ("unet", "num_res_blocks", -1, "a whole number from 1"),
    ("unet", "channel_mult", [], "a list of 1 to 8"),
    ("unet", "channel_mult", [1] * 9, "a list of 1 to 8"),
    ("unet", "channel_mult", [2, 4, 4], "must begin with 1"),
    ("unet", "channel_mult", 2, "a list"),
    ("unet", "attention_levels", [3], "levels 0 to 2"),
    ("unet", "attention_levels", [[1]], "a list"),
    ("unet", "context_dim", 64, "text has a hidden_size of 128"),
    ("unet", "in_channels", 9, "vae has z_channels of 4"),
    ("unet", "channels", 3, "no setting 'channels'"),
    ("vae", "latent_scale", 0, "a number from 0.0001"),
    ("vae", "latent_scale", -0.18215, "a number"),
    ("vae", "latent_scale", float("nan"), "a number"),
    ("vae", "latent_scale", float("inf"), "a number"),
    ("vae", "latent_scale", 10**400, "a number"),
    ("vae", "latent_scale", "0.18215", "a number"),
    ("vae", "norm_groups", 3, "must divide the width 16"),
    ("schedule", "beta_end", 5, "a number from 1e-09 to 0.999"),
    ("schedule", "beta_end", 0.0001, "above beta_start"),
    ("schedule", "beta_end", 0.5, "nothing of the image is left"),
    ("schedule", "beta_start", 0, "a number"),
    ("schedule", "train_timesteps", 400_000_000, "to 100000"),
    ("schedule", "train_timesteps", 1000.0, "a whole number"),
    ("schedule", "timestep_spacing", "linspace", "'leading' or 'trailing'"),
    ("text", "vocab_size", 10**9, "a whole number"),
    ("text", "hidden_size", None, "a whole number"),
    ("text", "num_attention_heads", 3, "must divide the width 128"),
    ("text", "num_hidden_layers", 100_000, "to 200"),
    ("text", "hidden_act", "__import__", "'quick_gelu'"),
    ("text", "eos_token_id", 627, "below vocab_size, 627"),
    ("text", "torch_dtype", "float16", "no setting 'torch_dtype'"),
    ("vision", "patch_size", 0, "a whole number from 1"),
    ("vision", "patch_size", 65, "at most image_size, 64"),
    ("vision", "image_size", "64", "a whole number"),
    ("model", "image_size", "64", "a whole number"),
    ("model", "image_size", 63, "a multiple of 16"),
    ("model", "image_size", 8192, "to 4096"),
    ("model", "guidance_scale", 101, "a number from 0 to 100"),
    ("model", "guidance_scale", None, "a number"),
    ("model", "projection_dim", False, "a whole number"),
    ("model", "reader", 1, "True or False"),
    ("model", "text", [], "a table of settings"),
    ("model", "vision", {}, "is missing"),
    ("model", "unet", 3, "a table of settings"),
    ("model", "schedule", None, "a table of settings"),
]


@pytest.mark.parametrize(("part", "name", "value", "words"), WRONG)
def test_a_wrong_setting_is_named_with_its_rule(part, name, value, words):
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(with_(part, **{name: value}))
    message = str(caught.value)
    assert words in message and name in message and message.isprintable() and len(message) < 250


def test_settings_that_make_too_many_blocks_are_refused():
    # Two levels of 33 blocks, and the middle block.
    with pytest.raises(UserError, match=f"makes {67 * 64} transformer blocks"):
        ModelConfig.from_dict(with_("unet", transformer_depth=64, num_res_blocks=16))


def test_every_way_to_make_a_configuration_checks_it():
    for wrong in ({"vae": None}, {"unet": {}}, {"image_size": 8.0}, {"text": {**TEXT, "vocab_size": -1}}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            dataclasses.replace(TINY, **wrong)
    text = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    with pytest.raises(UserError, match="text: vocab_size is missing"):
        dataclasses.replace(TINY, text=text)
    with pytest.raises(UserError, match="num_heads"):
        UNetConfig(num_heads=7)


@pytest.mark.parametrize(
    "config", [SD15.schedule, ScheduleConfig(0.0001, 0.02, 1000), ScheduleConfig(1e-6, 1e-3, 9)]
)
def test_the_last_signal_is_that_of_the_schedule(config):
    left = NoiseSchedule(config).alphas_cumprod[-1].item()
    assert config._signal() == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (Whole(1, 3), [1, 3], [0, 4, True, 1.0, "1", None, 10**400]),
        (Number(0, 1), [0, 0.5, 1], [-1e-9, 1.1, True, "0", None, float("nan"), 10**400]),
        (OneOf(1, "a", None), [1, "a", None], [True, 1.0, "b", [1]]),
        (FLAG, [True, False], [0, 1, None, "True"]),
        (Text(3), ["", "abc"], ["abcd", 3, None]),
        (ListOf(Whole(0, 9), 1, 3), [[1], (3, 2, 1)], [[], [1] * 4, [10], "123", {1: 1}]),
        (ListOf(Whole(0, 9), 1, 3, ascending=True, first=0), [[0], [0, 5]], [[1], [0, 0], [0, 3, 2]]),
        (TableOf(Whole(0, 9)), [{}, {"a": 1}], [{"a": "b"}, {1: 1}, []]),
        (AnyOf(OneOf(None), Whole(1, 2)), [None, 2], [3, "None"]),
    ],
)
def test_rules_accept_what_they_say_and_convert_nothing(rule, right, wrong):
    assert all(rule(value) for value in right)
    assert not any(rule(value) for value in wrong)
    assert str(rule).isprintable() and "object at" not in str(rule)


# Devices


@pytest.mark.parametrize("device", ["hpu", "gpu", "cuda:99", "cpu:x", "", "CPU ", 0, None, 3.5, ["cpu"]])
def test_a_missing_device_is_refused_in_one_sentence(device):
    with pytest.raises(UserError) as caught:
        check_device(device)
    message = str(caught.value)
    assert repr(device) in message and message.isprintable() and len(message) < 350


def test_existing_devices_pass():
    assert check_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    assert check_device("meta").type == "meta"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' cannot be used here"):
            check_device("cuda")


@pytest.mark.cuda
def test_a_cuda_device_passes():
    assert check_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="cannot be used here"):
        check_device(f"cuda:{torch.cuda.device_count()}")
