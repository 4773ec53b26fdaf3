"""Small models of every format, and hundreds of ways to damage their files.

`python mutations.py FOLDER` loads each damaged model in FOLDER and generates with it, and prints a line of
JSON for each: the damage, the end, and the seconds. All but the seconds is deterministic.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import sdcomp
from sdcomp.errors import NonFiniteError, UserError
from sdcomp.integer import to_int8
from sdcomp.model.clip import build_clip
from sdcomp.model.config import TINY, ModelConfig, UNetConfig, VAEConfig
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.model.unet import UNet
from sdcomp.model.vae import VAEDecoder, VAEEncoder
from sdcomp.pruning import prune_structured
from sdcomp.quantization import Calibrator, NotCalibratedError, TimeStepCalibratedQuantModel
from sdcomp.scenes import VOCABULARY
from sdcomp.training.caption_tokenizer import word_tokenizer

CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = ModelConfig(
    unet=UNetConfig(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2,
        context_dim=8, norm_groups=4,
    ),
    vae=VAEConfig(base_channels=4, channel_mult=(1, 2), num_res_blocks=1, norm_groups=2),
    text={**TINY.text, **CLIP}, vision={**TINY.vision, **CLIP, "image_size": 16},
    projection_dim=8, image_size=16,
)  # fmt: skip
PLAIN = ModelConfig(**{**vars(CONFIG), "vision": None})
PROMPTS = ["a small red star"]
SECONDS, BYTES = 5, 2**30
"""Limits for a damaged model: seconds of a processor, and memory in addition to that of a good one."""

Damage = tuple[str, str, str, Callable[[Path], None]]
"""A model, one of its files, the name of the damage, and the function that does it."""


def make_models(folder: Path) -> None:
    """Write the good models: a folder for each format."""
    vocab, merges = word_tokenizer(VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = build_clip(CONFIG).eval()
        whole = StableDiffusion(
            config=PLAIN,
            unet=UNet(CONFIG.unet).eval(), text_encoder=clip.text_model,
            encoder=VAEEncoder(CONFIG.vae).eval(), decoder=VAEDecoder(CONFIG.vae).eval(),
            tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24),
        )  # fmt: skip
    pruned = prune_structured(whole.unet, 0.3, mode="remove")
    sdcomp.save(whole.replace(config=CONFIG, clip=clip, unet=pruned), folder / "plain", torch.float16)
    q = TimeStepCalibratedQuantModel(whole.unet, timesteps=4, k=2, quant_filters=["time_embed"])
    Calibrator(whole, q).calibrate(PROMPTS, steps=4, batch_size=1)
    sdcomp.save(whole.replace(unet=q), folder / "quantized")
    sdcomp.save(whole.replace(unet=to_int8(q)), folder / "int8")
    sdcomp.save(whole.replace(unet=q), folder / "packed", format="packed")
    sdcomp.save(whole, folder / "diffusers", format="diffusers")
    for name in ("safetensors", "pickle"):
        shutil.copytree(folder / "quantized", folder / name, ignore=lambda _, names: set(names) - WORDS)
    sdcomp.save(whole, folder / "safetensors" / "model.safetensors")
    torch.save(load_file(folder / "safetensors" / "model.safetensors"), folder / "pickle" / "model.ckpt")


WORDS = {"vocab.json", "merges.txt"}
FILES = {
    "plain": ["config.json", "unet_channels.json", *sorted(WORDS)]
    + [f"{name}.safetensors" for name in ("unet", "vae", "clip")],
    "quantized": ["quantization.json", "quantization.safetensors"],
    "int8": ["int8.json", "int8.safetensors"],
    "packed": ["packed.json", "packed.safetensors"],
    "diffusers": ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
    + [f"{name}/config.json" for name in ("unet", "vae", "text_encoder")]
    + ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
    "safetensors": ["model.safetensors"],
    "pickle": ["model.ckpt"],
}
LOADED = {"safetensors": "model.safetensors", "pickle": "model.ckpt"}


def damages(folder: Path, seed: int = 0) -> Iterator[Damage]:
    """All damages, always in the same order."""
    for model, files in FILES.items():
        for file in files:
            rng = random.Random(f"{seed} {model} {file}")
            good = (folder / model / file).read_bytes()
            for what, function in _replaced().items():
                yield model, file, what, function
            contents = dict(_bytes(good, rng))
            if file.endswith(".json"):
                contents |= _json(
                    json.loads(good), rng, 25 if re.search("config|int8|packed|quant", file) else 8
                )
            if file.endswith(".safetensors"):
                made = _tensors(good, rng)
                contents |= {what: made[what] for what in rng.sample(sorted(made), 14)}
            if file in ("config.json", "int8.json", "packed.json"):
                contents |= {"nested": b'{"a":' * 100_000, "many": b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"}
            if file.endswith(".txt"):
                contents |= _lines(good.decode().splitlines(), rng)
            for what, content in contents.items():
                yield model, file, what, lambda path, content=content: path.write_bytes(content)


def _replaced() -> dict[str, Callable[[Path], object]]:
    """Damages that put something else in place of a file."""

    def listen(path: Path) -> None:
        # The path of a socket may have at most 100 characters.
        before = Path.cwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(before)

    return {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a socket": listen,
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to nothing": lambda path: path.symlink_to("nothing"),
        "nothing": lambda path: None,
        "empty": Path.touch,
        "a terabyte of zeros": lambda path: (path.touch(), os.truncate(path, 2**40)),
    }


def _bytes(good: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    for i in range(4):
        content = bytearray(good)
        places = [rng.randrange(len(good)) for _ in range(1 + i)]
        for place in places:
            content[place] ^= 1 << rng.randrange(8)
        yield f"bits changed at {places}", bytes(content)
    for end in (rng.randrange(len(good)), len(good) - 1):
        yield f"cut at {end}", good[:end]
    yield "longer", good + good[:100]


ODD = [
    None, True, -1, 0, 1, 2, 3, 20_000, 2**40, 10**400, 8.0, 0.5, 5, -0.1, 1e-300, 1e308, float("nan"),
    float("inf"), "64", "", "\ud800\n", "x" * 10_000, [], {}, [1], [[]], [0, 0], [5, 3], {"a": 1}, [1] * 1000,
]  # fmt: skip


def _json(good: dict, rng: random.Random, count: int) -> dict[str, bytes]:
    """A JSON file with a value of another kind or size, with one value less or one more."""
    contents, text, places = {}, json.dumps(good), list(_places(good))
    for i in range(count):
        changed = json.loads(text)
        *path, name = places[i % len(places)] if i < count // 2 else rng.choice(places)
        holder = changed
        for step in path:
            holder = holder[step]
        what, value = rng.choice(["is", "is", "is", "is", "is", "misses", "has more"]), rng.choice(ODD)
        if what == "is":
            holder[name] = value
        elif what == "misses":
            del holder[name]
        elif isinstance(holder, dict):
            holder["another"] = value
        else:
            holder.append(value)
        value = "" if what == "misses" else f" {value!r:.40}"
        contents[f"{'.'.join(map(str, [*path, name]))} {what}{value}"] = json.dumps(changed).encode()
    return contents


def _places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values in a table; of a long list or table only the first 20."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inside in list(items)[:20]:
        yield (*path, name)
        yield from _places(inside, (*path, name))


def _tensors(good: bytes, rng: random.Random) -> dict[str, bytes]:
    """A safetensors file with another header, or with extreme values, infinity or NaN."""
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    names = [name for name in header if name != "__metadata__"]

    def packed(header: dict | bytes, size: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if size is None else size).to_bytes(8, "little") + text + data

    def changed(name: str, **changes: object) -> bytes:
        return packed({**header, name: {**header[name], **changes}})

    entry = header[names[0]]
    contents = {
        "header of 2**62 bytes": packed(header, 2**62),
        "header that is a list": packed(b"[]"),
        "many names": packed(json.dumps(dict.fromkeys(map(str, range(100_000)), entry)).encode()),
    }
    for dtype in ("F64", "F16", "BF16", "I64", "I32", "I8", "BOOL", "F8_E4M3", "C64", "F99", 3):
        name = rng.choice(names)
        contents[f"{name} of type {dtype}"] = changed(name, dtype=dtype)
    for shape in ([], [0], [-1], [2**62, 4], [10**12], "3", None, [[1]], [1.0]):
        name = rng.choice(names)
        contents[f"{name} of shape {shape}"] = changed(name, shape=shape)
        contents[f"{name} turned"] = changed(name, shape=header[name]["shape"][::-1])
    for offsets in ([0, 2**62], [0, 0], [8, 4], [-4, 0], [0], "0"):
        name = rng.choice(names)
        contents[f"{name} at {offsets}"] = changed(name, data_offsets=offsets)
    for new in ("", "another", "a\nb\x1b[2J", "x" * 10_000):
        name = rng.choice(names)
        named = {new if old == name else old: value for old, value in header.items()}
        contents[f"{name} named {new[:9]!r}"] = packed(named)
    floats = [name for name in names if header[name]["dtype"] in ("F32", "F16")]
    for value in (float("nan"), float("inf"), -float("inf"), 6e4, -6e4):
        name = rng.choice(floats)
        (start, end), kind = header[name]["data_offsets"], header[name]["dtype"]
        dtype = torch.float16 if kind == "F16" else torch.float32
        one = torch.full((1,), value, dtype=dtype).view(torch.uint8).numpy().tobytes()
        body = data[:start] + one * ((end - start) // len(one)) + data[end:]
        contents[f"{name} is {value}"] = good[: 8 + size] + body
    return contents


def _lines(good: list[str], rng: random.Random) -> dict[str, bytes]:
    """Merges with a line missing, repeated, swapped or damaged."""
    i, j = rng.sample(range(2, len(good)), 2)
    changed = {
        "a line less": good[:i] + good[i + 1 :],
        "a line twice": good[:i] + good[i - 1 :],
        "lines swapped": [{i: good[j], j: good[i]}.get(k, line) for k, line in enumerate(good)],
        "three parts": [*good, "a b c"],
        "one part": [*good, "abc"],
        "a long line": [*good, "x" * 1_000_000 + " y"],
        "many lines": good + ["a b"] * 100_000,
    }
    return {what: "\n".join(lines).encode() for what, lines in changed.items()}


class TooLong(BaseException):
    """Not an Exception, so that no `except Exception` catches it."""


def ends(path: Path) -> tuple[str, str]:
    """Load a model and generate with it; return how that ends, and the error's message if any."""
    options = {"config": PLAIN} if path.suffix else {}
    try:
        sd = sdcomp.load(path, **options)
    except UserError as error:
        return "refused", str(error)
    try:
        images = sd.generate(PROMPTS, steps=1, batch_size=1, size=(16, 16))
    except (NonFiniteError, NotCalibratedError) as error:
        return "not finite", str(error)
    return ("generated", "") if images.isfinite().all() else ("infinite images", "")


def main(folder: Path) -> None:
    """Try each damage on a copy of its model."""

    def alarm(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)
    for model in FILES:
        assert ends(folder / model / LOADED.get(model, ""))[0] == "generated"
    # From here on, the process may take only this much memory more.
    used = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    for model, file, what, function in damages(folder):
        copy = Path(shutil.copytree(folder / model, folder / "damaged", copy_function=os.link))
        (copy / file).unlink()
        function(copy / file)
        start = time.process_time()
        # Longer than SECONDS, since other processes may be busy. The second one works even in a C function.
        signal.alarm(20 * SECONDS)
        faulthandler.dump_traceback_later(30 * SECONDS, exit=True)
        try:
            end, message = ends(copy / LOADED.get(model, ""))
        except (Exception, TooLong) as error:
            end, message = type(error).__name__, str(error)
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - start
        shutil.rmtree(copy)
        print(json.dumps([model, file, what, end, message, seconds]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
