"""One UNet step in int8 on other engines: this package's kernels and exports beside NNCF's quantization.

    python tests/benchmarks/deploy.py --model tiny --out deploy.csv
    python tests/benchmarks/deploy.py --model sd15 --out deploy.csv   # random weights, batch 2, 64x64 latents

Every model is made, and saved, in a process of its own: `make_gib` is that process's peak memory. Then, as in
`int8.py`, each runs in another process of its own, in turn with the float32 UNet. "10 % removed" takes away
about a tenth of each group's units, in widths of multiples of 16; its time does not depend on which units
they are. Needs the `deploy` and `peers` extras; NNCF at Stable Diffusion 1.5's size needs 13 GiB of memory.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from int8 import (
    MODELS,
    REFERENCE,
    Step,
    Worker,
    build,
    calibrated,
    diffusers_eager,
    fp32,
    inputs,
    measure,
    peak_memory,
)
from torch import nn

from sdcomp.evaluation import macs
from sdcomp.export import export, load_openvino
from sdcomp.integer import load_int8, save_int8, to_int8
from sdcomp.model.channel_map import apply_channel_map
from sdcomp.model.prune_groups import prune_groups


def smaller(unet: nn.Module, amount: float, multiple: int = 16) -> nn.Module:
    """A copy without the last units of each group."""
    kept = {}
    for group in prune_groups(unet):
        if group.rows:
            layer, _, _, repeats = next(group.slices(unet))
            width = len(layer.weight) // (group.units * repeats)
            step = multiple // math.gcd(multiple, width)
            removed = round(amount * group.units / step) * step
            kept[group.name] = list(range(group.units - removed))
    return apply_channel_map(copy.deepcopy(unet), {name: units for name, units in kept.items() if units})


Make = Callable[[str, Path], Path]


def our_int8(model: str, folder: Path, amount: float = 0.0) -> Path:
    unet = smaller(build(model), amount)
    return save_int8(to_int8(calibrated(unet, inputs(model)), execution="kernels"), folder)


def our_export(model: str, folder: Path, format: str, amount: float = 0.0) -> Path:
    q = calibrated(smaller(build(model), amount), inputs(model))
    sd = SimpleNamespace(unet=q, config=MODELS[model][0])  # an export needs no other parts
    return export(sd, folder / {"openvino": "unet.xml", "onnx": "unet.onnx"}[format], format=format)


def nncf_export(model: str, folder: Path) -> Path:
    import nncf
    import openvino

    call = inputs(model)
    graph = openvino.convert_model(build(model), example_input=call)
    data = nncf.Dataset([[part.numpy() for part in call]])
    graph = nncf.quantize(graph, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(graph, folder / "unet.xml", compress_to_fp16=False)
    return folder / "unet.xml"


def run_int8(model: str, folder: str, name: str) -> Step:
    unet, call = load_int8(Path(folder, name), execution="kernels"), inputs(model)
    return lambda: unet(*call)


def run_export(model: str, folder: str, name: str) -> Step:
    unet, (latents, timesteps, context) = load_openvino(Path(folder, name, "unet.xml")), inputs(model)
    return lambda: unet(latents, timesteps, context)


def run_nncf(model: str, folder: str, name: str) -> Step:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    ready = openvino.compile_model(Path(folder, name, "unet.xml"), "CPU", settings)
    arrays = [part.numpy() for part in inputs(model)]
    return lambda: ready(arrays)


def run_onnx(model: str, folder: str, name: str) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(Path(folder, name, "unet.onnx"), options)
    latents, timesteps, context = inputs(model)
    feed = {"latents": latents, "timestep": timesteps[:1].float(), "context": context}
    feed = {name: tensor.numpy() for name, tensor in feed.items()}
    return lambda: session.run(None, feed)


Run = Callable[[str, str, str], Step]
REMOVED = 0.1
VARIANTS: dict[str, tuple[Make, Run]] = {
    "sdcomp int8": (our_int8, run_int8),
    "sdcomp int8, 10 % removed": (partial(our_int8, amount=REMOVED), run_int8),
    "sdcomp export, openvino": (partial(our_export, format="openvino"), run_export),
    "sdcomp export, openvino, 10 % removed": (
        partial(our_export, format="openvino", amount=REMOVED),
        run_export,
    ),
    "nncf, openvino": (nncf_export, run_nncf),
    "sdcomp export, onnxruntime": (partial(our_export, format="onnx"), run_onnx),
}
PLAIN: dict[str, Callable[[str, str], Step]] = {REFERENCE: fp32, "diffusers fp32": diffusers_eager}


def make_and_report(make: Make, model: str, folder: Path, threads: int, pipe: Connection) -> None:
    """The process that makes a model: sends its seconds, its peak memory and the bytes of its files."""
    torch.set_num_threads(threads)
    try:
        begin = time.perf_counter()
        with torch.no_grad():
            folder.mkdir()
            make(model, folder)
        files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        made = {"make_seconds": time.perf_counter() - begin, "make_gib": peak_memory() / 2**30}
        pipe.send({**made, "file_gb": files / 1e9})
    except Exception as error:  # a peer's failure is a line of the table, whatever it is
        pipe.send({"note": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"})


def made(make: Make, *args: object) -> dict[str, object]:
    there, here = multiprocessing.Pipe()
    process = multiprocessing.Process(target=make_and_report, args=(make, *args, here))
    process.start()
    here.close()
    try:
        answer = there.recv()
    except EOFError:
        answer = {"note": "its process was killed; is there enough memory?"}
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--variants", nargs="+", choices=[*PLAIN, *VARIANTS], default=[*PLAIN, *VARIANTS])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="CSV file for the table")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as folder:
        settings = (args.model, folder, args.threads)
        making = {}
        for name in args.variants:
            if name in VARIANTS:
                making[name] = made(VARIANTS[name][0], args.model, Path(folder, name), args.threads)
                print(name, making[name], flush=True)
        reference = Worker(fp32, *settings)
        rows = []
        for name in args.variants:
            if "note" in making.get(name, {}):
                rows.append({"variant": name, **making[name]})
                continue
            step = PLAIN[name] if name in PLAIN else partial(VARIANTS[name][1], name=name)
            found = measure(name, None if name == REFERENCE else step, reference, args.repeats, *settings)
            rows.append({**found, **making.get(name, {})})
            print(rows[-1], flush=True)
        reference.stop()
    with torch.device("meta"):
        whole = build(args.model)
        call = [part.to("meta") for part in inputs(args.model)]
        left = macs(smaller(whole, REMOVED), *call) / macs(whole, *call)
    table = pd.DataFrame(rows)
    table["arithmetic_left"] = [left if "removed" in name else 1.0 for name in table.variant]
    print(table.to_string(index=False, float_format="%.3f"))
    if args.out:
        table.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
