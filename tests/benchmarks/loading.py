"""Loading and running Stable Diffusion 1.5 here and in diffusers: seconds, memory, seconds of a UNet step.

    python tests/benchmarks/loading.py --out loading.csv            # full size, random weights, 15 GB of disk
    python tests/benchmarks/loading.py --small --out loading.csv    # the base model's sizes

The same weights are written once, as a single file (safetensors and pickle) and as a diffusers folder, and
loaded in turn, each time by a process of its own that has imported everything before. `load_s` is what the
call takes; since weights may be mapped and read later, `read_s` adds one pass over all of them. Memory is
the most anonymous memory while loading beyond what there was before (Linux). UNet steps are timed in turn in
one process. Needs the `peers` extra; `accelerate`, which diffusers loads faster with, if it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

import sdcomp
from sdcomp.evaluation.timing import interleaved_times, median
from sdcomp.files import resolve_input
from sdcomp.model import SD15, TINY, StableDiffusion, UNet, VAEDecoder, VAEEncoder
from sdcomp.model.clip import build_text_encoder
from sdcomp.model.config import ModelConfig
from sdcomp.model.tokenizer import load_tokenizer

CASES = [
    ("model.safetensors", "float32"),
    ("model.safetensors", "float16"),
    ("half.safetensors", "float32"),
    ("model.ckpt", "float32"),
    ("diffusers", "float32"),
    ("diffusers", "bfloat16"),
]


def config_of(small: bool) -> ModelConfig:
    return replace(TINY, vision=None, reader=False) if small else SD15


def write(folder: Path, small: bool) -> None:
    config = config_of(small)
    torch.manual_seed(0)
    sd = StableDiffusion(
        config=config,
        unet=UNet(config.unet),
        encoder=VAEEncoder(config.vae),
        decoder=VAEDecoder(config.vae),
        text_encoder=build_text_encoder(config),
        tokenizer=load_tokenizer(resolve_input("data/tiny" if small else "data/clip_tokenizer"), config),
    )
    sdcomp.save(sd, folder / "model.safetensors")
    sdcomp.save(sd, folder / "half.safetensors", torch.float16)
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "model.ckpt")
    sdcomp.save(sd, folder / "diffusers", format="diffusers")


def load_ours(path: Path, dtype: torch.dtype, small: bool) -> list[nn.Module]:
    sd = sdcomp.load(
        path, dtype=dtype, config=config_of(small), tokenizer=path.parent / "diffusers" / "tokenizer"
    )
    return [sd.unet, sd.encoder, sd.decoder, sd.text_encoder]


def load_theirs(path: Path, dtype: torch.dtype, small: bool) -> list[nn.Module]:
    from diffusers import StableDiffusionPipeline

    if path.is_dir():
        pipe = StableDiffusionPipeline.from_pretrained(path, torch_dtype=dtype)
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path), config=str(path.parent / "diffusers"), local_files_only=True, torch_dtype=dtype
        )
    return [pipe.unet, pipe.vae, pipe.text_encoder]


LOADERS = {"sdcomp": load_ours, "diffusers": load_theirs}


def anonymous_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_load(loader: str, path: Path, dtype: str, small: bool) -> dict[str, float]:
    import diffusers  # noqa: F401

    peak, done, before = 0, threading.Event(), anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    parts = LOADERS[loader](path, getattr(torch, dtype), small)
    loaded = time.perf_counter() - start
    done.set()
    thread.join()
    peak = max(peak, anonymous_bytes()) - before
    start = time.perf_counter()
    for part in parts:
        for parameter in part.parameters():
            parameter.detach().sum()
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return {
        "load_s": loaded,
        "read_s": loaded + time.perf_counter() - start,
        "peak_GB": peak / 1e9,
        "peak_per_weights": peak / size,
    }


def _child(pipe, function: Callable, args: tuple) -> None:
    pipe.send(function(*args))


def apart(function: Callable, *args: object) -> dict[str, float]:
    """What `function` returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


@torch.inference_mode()
def measure_steps(folder: Path, dtype: str, small: bool, repeats: int) -> list[dict[str, object]]:
    """A guided step, batch 2, at the model's own image size."""
    config, kind = config_of(small), getattr(torch, dtype)
    ours = load_ours(folder / "model.safetensors", kind, small)[0]
    theirs = load_theirs(folder / "diffusers", kind, small)[0].eval()
    side, length = config.image_size // config.vae.downsampling, config.text["max_position_embeddings"]
    x = torch.randn(2, 4, side, side, dtype=kind)
    context = torch.randn(2, length, config.unet.context_dim, dtype=kind)
    t = torch.full((2,), 500)
    difference = (ours(x, t, context) - theirs(x, t, context).sample).abs().max().item()
    times = interleaved_times(
        {"sdcomp": lambda: ours(x, t, context), "diffusers": lambda: theirs(x, t, context).sample}, repeats, 1
    )
    rows = []
    for loader, values in times.items():
        step = median(values)
        rows.append({
            "case": "UNet step", "dtype": dtype, "loader": loader, "step_s": step.value,
            "step_low": step.low, "step_high": step.high, "n": repeats, "max_difference": difference,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the base model's sizes instead of SD 1.5's")
    parser.add_argument("--parts", nargs="+", choices=("load", "step"), default=["load", "step"])
    parser.add_argument("--repeats", type=int, default=5, help="loads and steps timed, after one to warm up")
    parser.add_argument("--folder", help="where the weights are written (kept, and used again, if given)")
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "diffusers" / "model_index.json").exists():
            write(folder, options.small)
        rows: list[dict[str, object]] = []
        for name, dtype in CASES if "load" in options.parts else ():
            seen: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
            for turn in range(options.repeats + 1):
                for loader in LOADERS if turn % 2 else reversed(LOADERS):
                    measured = apart(measure_load, loader, folder / name, dtype, options.small)
                    if turn:  # the first brings the file into the page cache
                        seen[loader].append(measured)
            for loader, values in seen.items():
                table = pd.DataFrame(values)
                spread = {
                    "load_low": table.load_s.min(),
                    "load_high": table.load_s.max(),
                    "n": options.repeats,
                }
                rows.append({"case": name, "dtype": dtype, "loader": loader, **table.median(), **spread})
                print(rows[-1], flush=True)
        for dtype in ("float32", "bfloat16") if "step" in options.parts else ():
            rows += measure_steps(folder, dtype, options.small, options.repeats)
            print(rows[-2:], flush=True)
    table = pd.DataFrame(rows).assign(
        model="base" if options.small else "SD 1.5",
        accelerate=importlib.util.find_spec("accelerate") is not None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
