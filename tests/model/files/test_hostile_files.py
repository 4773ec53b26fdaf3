"""Files with hostile or unexpected content: none of it runs, and one sentence says what they are."""

import builtins
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdcomp
from sdcomp.files import regular
from sdcomp.model import ModelError, load
from sdcomp.model.files.tensors import read_tensors


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The content of a single file whose sizes are wrong."""
    return {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(128, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(8, 768),
    }


def refused(file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(file)
    message = str(caught.value)
    assert str(file) in message and "\n" not in message and len(message) < 500
    # PyTorch's own message advises to switch the protection off.
    assert "weights_only" not in message
    return message


class _Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _nested(canary: str) -> bytes:
    inner = io.BytesIO()
    torch.save(_Calls(os.system, f"touch {canary}"), inner)
    return inner.getvalue()


HOSTILE = {
    "posix.system": lambda canary: _Calls(os.system, f"touch {canary}"),
    "eval": lambda canary: _Calls(builtins.eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: _Calls(builtins.exec, f"open({canary!r}, 'w')"),
    "Popen": lambda canary: _Calls(subprocess.Popen, ["touch", canary]),
    "torch.storage._load_from_bytes": lambda canary: _Calls(torch.storage._load_from_bytes, _nested(canary)),
    "torch.serialization.load": lambda canary: _Calls(torch.load, io.BytesIO(_nested(canary))),
    "getattr": lambda canary: _Calls(getattr, [], "append"),
    "Path": lambda canary: Path(canary),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_calls_a_function_is_refused_with_its_name(tmp_path, state, name, legacy):
    canary = tmp_path / "canary"
    file = tmp_path / "model.ckpt"
    held = {"state_dict": state, "callbacks": HOSTILE[name](str(canary))}
    torch.save(held, file, _use_new_zipfile_serialization=not legacy)
    message = refused(file)
    assert name in message and "is refused" in message
    assert not canary.exists()


def test_the_hostile_files_would_have_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save(HOSTILE["eval"](str(canary)), tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert canary.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(_Calls(os.system, f"touch {canary}")))
    refused(tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(_Calls(os.system, f"touch {canary}"), protocol=2))
    assert "posix.system" in refused(tmp_path / "model.ckpt")
    assert not canary.exists()


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_callback_of_the_published_file_is_accepted_without_its_package(tmp_path, state, package):
    def write(name: str, file: Path) -> None:
        # A pickle stores a class by its module and name, so both must exist while it is written.
        path = f"{package}.callbacks.model_checkpoint"
        kind = type(name, (), {"__module__": path})
        with pytest.MonkeyPatch.context() as patch:
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
            setattr(sys.modules[path], name, kind)
            instance = kind()
            instance.monitor = "val/loss"
            torch.save({"state_dict": state, "callbacks": {kind: {"best": 1}, "other": instance}}, file)

    write("ModelCheckpoint", tmp_path / "model.ckpt")
    before = set(sys.modules)
    read = read_tensors(tmp_path / "model.ckpt")
    assert read.keys() == state.keys()
    assert not any(
        name.startswith(("pytorch_lightning", "lightning")) for name in sys.modules.keys() - before
    )
    # Only our reader accepts it, and only this class.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "model.ckpt", weights_only=True)
    write("EarlyStopping", tmp_path / "model.ckpt")
    assert f"{package}.callbacks.model_checkpoint.EarlyStopping" in refused(tmp_path / "model.ckpt")


# Sizes


class _Rebuilt:
    """An object whose pickle is a tensor with a larger shape than its storage."""

    def __init__(self, shape, stride, offset=0):
        storage = torch.zeros(4).untyped_storage()
        self.storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        self.declared = offset, shape, stride, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage, *self.declared)


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    "tensor",
    [
        _Rebuilt((10**12,), (1,)),
        _Rebuilt((2, 2), (10**9, 1)),
        _Rebuilt((4,), (1,), 10**10),
        _Rebuilt((10**6, 10**6), (0, 0)),  # takes no memory until it is converted
    ],
)
def test_an_absurd_size_is_refused_before_memory_is_taken(tmp_path, state, tensor):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {**state, name: tensor}}, tmp_path / "model.ckpt")
    message = refused(tmp_path / "model.ckpt")
    assert "damaged" in message or "does not fit" in message


def test_an_absurd_safetensors_header_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    for header in (
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    ):
        file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        assert "damaged or no safetensors file" in refused(file)
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "damaged or no safetensors file" in refused(file)
    # A valid header that only takes too long to parse.
    header = b'{"__metadata__": {"a": "' + b"x" * 2**24 + b'"}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"a header of {len(header)} bytes" in refused(file)


def test_a_compressed_archive_is_not_unpacked(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "good.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "good.ckpt") as good,
        zipfile.ZipFile(tmp_path / "model.ckpt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in good.infolist():
            bad.writestr(entry.filename, good.read(entry))
    assert "compressed archive" in refused(tmp_path / "model.ckpt")


# Files that are something else


def test_files_that_are_something_else_are_named(tmp_path, state):
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, file)
    zipped = file.read_bytes()
    torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    legacy = file.read_bytes()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("v1-5-pruned-emaonly.ckpt", zipped)
    download = file.read_bytes()
    contents = {
        b"<!DOCTYPE html>\n<html><body>Sign in</body></html>": "a web page",
        b"\n  <html>": "a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:cc6cb27103\nsize 4": "Git LFS pointer",
        b"GGUF\x03\0\0\0" + b"\0" * 100: "GGUF",
        b"": "damaged",
        b"\0" * 5000: "damaged",
        zipped[:-100]: "damaged or truncated",
        zipped[: len(zipped) // 2]: "damaged or truncated",
        legacy[:-100]: "damaged or truncated",
        legacy[:50]: "damaged",
        download: "zip archive without a PyTorch checkpoint",
        pickle.dumps([1, 2], protocol=2): "damaged",
    }
    for content, words in contents.items():
        file.write_bytes(content)
        assert words in refused(file), content[:60]
    for held in ({"a": 1}, {1: torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2), {"state_dict": {}}, {}):
        torch.save(held, file)
        assert "holds no weights by name" in refused(file)
    file.unlink()
    os.mkfifo(file)
    assert "is a pipe, a socket or a device, not a file" in refused(file)


def test_files_that_would_block_or_fill_the_memory_are_not_opened(tmp_path):
    file = tmp_path / "file"
    for make, words in (
        (os.mkfifo, "a pipe, a socket or a device"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a pipe, a socket or a device"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.symlink_to("nowhere"), "a link to a file that is missing"),
        (lambda path: None, "is missing"),
        (lambda path: (path.touch(), os.truncate(path, 101)), "has 101 bytes, but at most 100 are read"),
    ):
        make(file)
        with pytest.raises(ModelError, match=re.escape(words)) as caught:
            regular(file, ModelError, most=100)
        assert str(file) in str(caught.value)
        if os.path.lexists(file):
            file.rmdir() if file.is_dir() else file.unlink()
    file.write_bytes(b"1" * 100)
    (tmp_path / "link").symlink_to(file)
    assert regular(tmp_path / "link", most=100) == tmp_path / "link"


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "data/" + "y/" * 3000])
def test_an_impossible_path_is_an_error_of_one_sentence(name):
    with pytest.raises(ModelError, match="does not exist") as caught:
        load(name)
    assert "\n" not in str(caught.value)


OTHERS = {
    "SDXL": {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77)},
    "Stable Diffusion 2.x": {"cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (1024,)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias": (8,)},
    "Flux": {"double_blocks.0.img_attn.qkv.bias": (8,)},
    "ControlNet": {"control_model.input_blocks.0.0.bias": (320,)},
    "LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)},
}
ALONE = {
    "LoRA, a change": {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 320)},
    "textual inversion": {"emb_params": (2, 768)},
    "UNet of a diffusers folder": {"down_blocks.0.resnets.0.conv1.bias": (320,)},
    "VAE of a diffusers folder": {"encoder.down_blocks.0.resnets.0.conv1.bias": (128,)},
    "UNet alone": {"input_blocks.0.0.bias": (320,)},
    "autoencoder alone": {"decoder.conv_in.bias": (512,)},
    "text encoder alone": {"text_model.embeddings.token_embedding.weight": (8, 768)},
    "has no UNet": {"something.else": (1,)},
}


@pytest.mark.parametrize("what", [*OTHERS, *ALONE])
def test_checkpoints_of_other_models_are_recognized(tmp_path, state, what):
    known = {name: torch.zeros(shape) for name, shape in (OTHERS | ALONE)[what].items()}
    save_file((state if what in OTHERS else {}) | known, tmp_path / "model.safetensors")
    assert what in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("input_blocks.0.0.weight", (320, 9, 3, 3), "an inpainting model"),
        ("input_blocks.0.0.weight", (320, 8, 3, 3), "InstructPix2Pix"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 1024), "Stable Diffusion 2.x"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 2048), "SDXL"),
        ("input_blocks.0.0.weight", (2,), "does not fit Stable Diffusion 1.x: it lacks"),
    ],
)
def test_relatives_are_recognized_by_their_shapes(tmp_path, state, name, shape, words):
    save_file({**state, f"model.diffusion_model.{name}": torch.zeros(shape)}, tmp_path / "model.safetensors")
    assert words in refused(tmp_path / "model.safetensors")


def test_missing_parts_are_named(tmp_path, state):
    for prefix, what in (("first_stage_model", "autoencoder"), ("cond_stage_model", "text encoder")):
        rest = {name: t for name, t in state.items() if not name.startswith(prefix)}
        save_file(rest, tmp_path / "model.safetensors")
        assert f"has no {what}" in refused(tmp_path / "model.safetensors")


def test_weights_of_other_types_are_refused(small, tmp_path):
    folder = sdcomp.save(small.replace(), tmp_path / "model", format="diffusers")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    good = {name: t.clone() for name, t in load_file(file).items()}
    for kind in (torch.int8, torch.float8_e4m3fn, torch.bool):
        file.unlink()
        save_file({**good, "conv_in.weight": good["conv_in.weight"].to(kind)}, file)
        with pytest.raises(ModelError, match=f"holds input_blocks.0.0.weight as {str(kind)[6:]}"):
            load(folder)
    bad = folder / "unet" / "diffusion_pytorch_model.bin"
    file.unlink()
    torch.save({**good, "conv_in.weight": good["conv_in.weight"].to_sparse()}, bad)
    with pytest.raises(ModelError, match="no dense tensor"):
        load(folder)
    torch.save({**good, "conv_in.weight": good["conv_in.weight"].to("meta")}, bad)
    with pytest.raises(ModelError, match="no dense tensor"):
        load(folder)
