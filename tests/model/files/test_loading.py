"""Model folders: saved models come back bit for bit, and wrong folders are refused in one sentence."""

import copy
import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import sdcomp
from sdcomp import files
from sdcomp.errors import UserError
from sdcomp.files import resolve_input
from sdcomp.model import TINY, ModelError, StableDiffusion, load, save
from sdcomp.model.clip import build_clip
from sdcomp.model.tokenizer import tokenize
from sdcomp.pruning import prune_unstructured
from sdcomp.scenes import SceneReader

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = ("unet", "vae", "clip", "reader")
FILES = {f"{name}.safetensors" for name in WEIGHTS} | {"config.json", "vocab.json", "merges.txt"}
PROMPTS = ["a small red star on a navy background"]
PARTS = ("unet", "encoder", "decoder", "text_encoder", "clip", "reader")


def complete(sd: StableDiffusion, randomize) -> StableDiffusion:
    """The model with an image encoder, and with a reader that has other than initial batch statistics."""
    clip, reader = randomize(build_clip(sd.config), 5), randomize(SceneReader(), 6)
    for module in reader.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return sd.replace(clip=clip, text_encoder=clip.text_model, reader=reader)


@pytest.fixture(scope="module")
def whole(small, randomize):
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = dataclasses.replace(small.config, vision={**small.config.vision, **narrow})
    return complete(small.replace(config=config), randomize)


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory) -> Path:
    """A good folder; tests must not change it."""
    return save(whole, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A good folder that a test may break: replace its files, since their content is shared."""
    return Path(shutil.copytree(saved, tmp_path / "model", copy_function=os.link))


def replace_file(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def states(sd: StableDiffusion) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in PARTS
        if getattr(sd, part) is not None
        for name, tensor in getattr(sd, part).state_dict().items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# Saved models come back


def test_a_model_of_the_tiny_models_size_comes_back_bit_for_bit(tiny, randomize, tmp_path):
    sd = complete(tiny, randomize)
    assert sdcomp.save(sd, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    loaded = sdcomp.load(tmp_path / "a" / "b")
    assert loaded.config == sd.config == TINY
    assert loaded.text_encoder is loaded.clip.text_model
    assert not any(m.training for part in PARTS for m in getattr(loaded, part).modules())
    assert_same(states(loaded), states(sd))
    assert torch.equal(tokenize(loaded.tokenizer, PROMPTS), tokenize(sd.tokenizer, PROMPTS))

    # Give both models the same memory format, so that the same kernels run.
    same = sd.replace(**{name: copy.deepcopy(getattr(sd, name)) for name in ("unet", "encoder", "decoder")})
    for part in (same.unet, same.encoder, same.decoder):
        part.to(memory_format=torch.channels_last)
    options = {"steps": 2, "batch_size": 1, "seed": 3}
    images = loaded.generate(PROMPTS, **options)
    assert torch.equal(images, same.generate(PROMPTS, **options))
    assert images.std() > 0.01
    assert loaded.reader.read(images, threshold=0) == sd.reader.read(images, threshold=0)


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path):
    again = sdcomp.save(load(saved), tmp_path)
    assert {path.name for path in again.iterdir()} == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_half_precision_halves_the_files_and_rounds_once(whole, saved, tmp_path):
    half = sdcomp.save(whole, tmp_path, torch.float16)
    for name in WEIGHTS:
        full = (saved / f"{name}.safetensors").stat().st_size
        assert 0.45 * full < (half / f"{name}.safetensors").stat().st_size < 0.6 * full
    rounded = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in states(whole).items()
    }
    assert_same(states(load(half)), rounded)
    # Saving converts copies.
    assert whole.dtype == torch.float32

    sd = load(saved, dtype=torch.float16)
    assert {p.dtype for part in PARTS[:-1] for p in getattr(sd, part).parameters()} == {torch.float16}
    # The reader only judges images: it keeps its type.
    assert_same(sd.reader.state_dict(), whole.reader.state_dict())
    assert sd.generate(PROMPTS, steps=1, batch_size=1).dtype == torch.float32


def test_a_model_without_image_encoder_and_reader_has_no_files_for_them(small, tmp_path):
    config = dataclasses.replace(small.config, vision=None, reader=False)
    sd = small.replace(config=config)
    folder = sdcomp.save(sd, tmp_path)
    assert {path.name for path in folder.iterdir()} == (
        FILES - {"clip.safetensors", "reader.safetensors"} | {"text_encoder.safetensors"}
    )
    loaded = load(folder)
    assert loaded.clip is None and loaded.reader is None and loaded.config == config
    assert_same(states(loaded), states(sd))


def test_saved_files_have_the_permissions_of_the_umask(saved):
    umask = os.umask(0)
    os.umask(umask)
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


# Saving over a folder


def test_a_model_stays_usable_when_it_is_saved_over_its_own_folder(folder):
    sd = load(folder)
    before = {name: tensor.clone() for name, tensor in states(sd).items()}
    pruned = sd.replace(unet=prune_unstructured(sd.unet, 0.5))
    sdcomp.save(pruned, folder, torch.float16)
    assert_same(states(sd), before)
    assert sd.generate(PROMPTS, steps=1, batch_size=1).isfinite().all()
    # A model can be saved over itself.
    sdcomp.save(sd, folder)
    assert_same(states(load(folder)), before)
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_save_that_fails_is_one_sentence_and_leaves_whole_files_only(whole, folder):
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = whole.replace(config=dataclasses.replace(whole.config, guidance_scale=1.5))
    # A folder stands where a file should go.
    for name in ("clip.safetensors", "vocab.json"):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(UserError, match="cannot be written") as caught:
            sdcomp.save(other, folder)
        assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)
        assert {path.name for path in folder.iterdir()} == FILES
        (folder / name).rmdir()
        (folder / name).write_bytes(good[name])
    # A file stands where the folder should be.
    with pytest.raises(UserError, match="cannot be written"):
        sdcomp.save(other, folder / "config.json")
    # The configuration is written last.
    assert (folder / "config.json").read_bytes() == good["config.json"]
    assert_same(states(load(folder)), states(whole))


def test_a_full_disk_is_one_sentence_and_leaves_whole_files_only(whole, folder, monkeypatch):
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(state, path, metadata):
        Path(path).write_bytes(b"half")
        # The error that safetensors raises.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left") as caught:
        sdcomp.save(whole, folder)
    assert str(folder / "unet.safetensors") in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


def test_a_replaced_text_encoder_is_not_lost_silently(whole, tmp_path):
    other = whole.replace(text_encoder=copy.deepcopy(whole.text_encoder))
    with pytest.raises(ModelError, match="the text encoder was replaced, but clip was not"):
        sdcomp.save(other, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_save_that_is_killed_leaves_whole_files_only(whole, folder, monkeypatch):
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def killed(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            sdcomp.save(whole, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


# Paths


def test_a_relative_path_is_found_here_or_in_the_repository(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_input("data/prompts") == ROOT / "data" / "prompts"
    assert resolve_input(Path("no/such")) == Path("no/such")

    # A repository whose only model is the one saved here.
    repository = tmp_path / "repository"
    (repository / "data").mkdir(parents=True)
    folder.rename(repository / "data" / "mine")
    monkeypatch.setattr(files, "ROOT", repository)
    assert load("data/mine").config.image_size == 64
    shutil.copytree(repository / "data" / "mine", "data/mine")
    config = json.loads(Path("data/mine/config.json").read_text(encoding="utf-8"))
    Path("data/mine/config.json").write_text(json.dumps({**config, "guidance_scale": 2.5}), encoding="utf-8")
    assert load("data/mine").config.guidance_scale == 2.5


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_input("~/model") == tmp_path / "model"
    assert resolve_input("~no_such_user/model") == Path("~no_such_user/model")


# Devices and types


def test_a_missing_device_is_refused_before_anything_is_read():
    for device in ("hpu", "gpu", 3, *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(UserError, match="device") as caught:
            load("data/no_such_model", device=device)
        assert repr(device) in str(caught.value) and "\n" not in str(caught.value)


def test_with_another_unet_the_stored_type_is_kept(whole, tmp_path):
    folder = sdcomp.save(whole, tmp_path, torch.float16)
    unet = nn.Identity()
    sd = load(folder, dtype=None, unet=unet)
    assert sd.unet is unet and sd.dtype == torch.float16


# Errors are one sentence


def assert_refused(path: Path | str, *words: object) -> None:
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and isinstance(caught.value, ValueError)
    for word in words:
        assert str(word) in message, message
    assert caught.value._render_traceback_() == [f"ModelError: {message}"]


def test_a_missing_folder_or_one_without_a_model_is_named(tmp_path, saved):
    assert_refused("data/no_such_model", "'data/no_such_model' does not exist")
    assert_refused(tmp_path, tmp_path, "no config.json")
    assert_refused(saved / "unet.safetensors", saved / "unet.safetensors", "no config.json")


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, folder / name, "is missing")


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_truncated_weight_file_is_named(folder, name):
    file = folder / f"{name}.safetensors"
    replace_file(file, file.read_bytes()[:-1])
    assert_refused(folder, file, "damaged")


def test_a_file_without_weights_is_named(folder):
    file = folder / "unet.safetensors"
    good = file.read_bytes()
    contents = [
        b"",
        good[:40],
        b"\xff" * 500,
        # A failed download often leaves this.
        b"<!DOCTYPE html>\n<html>\n<body>not found</body>\n</html>\n",
        # A header of the right length that is not JSON.
        good[:8] + b"\n" * int.from_bytes(good[:8], "little") + good[8:],
    ]
    for content in contents:
        replace_file(file, content)
        assert_refused(folder, file, "damaged")
    file.unlink()
    file.mkdir()
    assert_refused(folder, file)


@pytest.mark.parametrize("name", WEIGHTS)
def test_for_another_architecture_the_first_different_weight_is_named(folder, name):
    file = folder / f"{name}.safetensors"
    good = {key: tensor.clone() for key, tensor in load_file(file).items()}
    first = sorted(good)[0]

    def write(state: dict[str, torch.Tensor]) -> None:
        file.unlink()
        save_file(state, file)

    write({key: tensor for key, tensor in good.items() if key != first})
    assert_refused(folder, file, "lacks", first)
    write({**good, "another.weight": torch.zeros(1)})
    assert_refused(folder, file, "another.weight")
    grown = torch.zeros(2, *good[first].shape)
    write({**good, first: grown})
    assert_refused(folder, file, first, tuple(grown.shape), tuple(good[first].shape))
    write(good)
    load(folder)


def test_the_weights_of_another_part_are_refused(folder):
    replace_file(folder / "unet.safetensors", (folder / "vae.safetensors").read_bytes())
    assert_refused(folder, folder / "unet.safetensors", "input_blocks.0.0.bias")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[1]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe{}",
        b'{"unet": 3}',
        b'{"vae": null}',
        b'{"vae": []}',
    ],
)
def test_a_broken_configuration_is_named(folder, content):
    replace_file(folder / "config.json", content)
    assert_refused(folder, folder / "config.json", "is not a model configuration")


@pytest.mark.parametrize(
    ("part", "setting", "value", "word"),
    [
        (None, "reader_model", True, "'reader_model'"),
        ("unet", "channels", 3, "'channels'"),
        ("vae", "scale", 1.0, "'scale'"),
        ("schedule", "beta_end", "large", ""),
        ("unet", "norm_groups", 7, "7"),
        ("unet", "norm_groups", 0, ""),
        ("unet", "model_channels", "16", ""),
        ("unet", "channel_mult", 2, ""),
        ("vae", "base_channels", -8, ""),
        ("text", "hidden_size", "32", "hidden_size"),
        ("text", "hidden_size", 33, "33"),
        ("text", "hidden_act", "no_such_function", "no_such_function"),
        ("vision", "patch_size", 0, ""),
        (None, "text", 3, ""),
        (None, "projection_dim", "128", "projection_dim"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_impossible_settings_are_refused_with_their_file(folder, part, setting, value, word):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    (config if part is None else config[part])[setting] = value
    replace_file(file, json.dumps(config).encode())
    assert_refused(folder, file, word)


def test_a_conversion_refuses_values_that_are_not_finite(whole, folder, tmp_path):
    file = folder / "unet.safetensors"
    good = {key: tensor.clone() for key, tensor in load_file(file).items()}
    name = "middle_block.0.in_layers.2.weight"
    for value in (float("nan"), float("inf"), 1e6):
        bad = good[name].clone()
        bad[1, 2] = value
        file.unlink()
        save_file({**good, name: bad}, file)
        with pytest.raises(ModelError, match=f"{name} has values that are infinite or NaN in torch.float16"):
            load(folder, dtype=torch.float16)
        # Mapped weights are not read; `generate` checks its results.
        assert load(folder).unet.get_parameter(name).isfinite().all() == (value == 1e6)
    # The sum overflows, but no value does.
    file.unlink()
    save_file({**good, name: torch.full_like(good[name], 3e38).bfloat16()}, file)
    assert load(folder).unet.get_parameter(name).min() > 2e38


def test_a_configuration_of_another_size_is_refused_by_its_weights(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["unet"]["model_channels"] *= 2
    replace_file(file, json.dumps(config).encode())
    assert_refused(folder, folder / "unet.safetensors", "does not fit config.json")


def test_a_vocabulary_of_another_size_is_refused(folder):
    file = folder / "vocab.json"
    vocab = json.loads(file.read_text(encoding="utf-8"))
    extra = {**vocab, "!!": len(vocab)}
    replace_file(file, json.dumps(extra).encode())
    assert_refused(folder, folder, "vocab.json")
    fewer = {token: i for token, i in vocab.items() if token != "ÿ</w>"}
    replace_file(file, json.dumps(fewer).encode())
    assert_refused(folder, folder, "vocab.json", "626 tokens", "627")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b""),
        ("vocab.json", b"{"),
        ("vocab.json", b"[]"),
        ("vocab.json", b"{}"),
        ("vocab.json", b"\xff\xfe"),
        ("merges.txt", b""),
        ("merges.txt", b"#version: 0.2\na b\n"),
        ("merges.txt", b"\xff\xfe"),
        ("merges.txt", None),
    ],
)
def test_a_broken_tokenizer_file_is_named(folder, name, content):
    if content is None:
        # A copy that stopped half-way: with only the first merges, most words would fall apart.
        good = (folder / name).read_bytes()
        content = good[: good.index(b"\n", len(good) // 2) + 1]
    replace_file(folder / name, content)
    assert_refused(folder, folder, name)
