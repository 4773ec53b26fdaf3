"""One UNet step in int8 on other engines: this package's kernels and exports beside NNCF's quantization.

    python tests/benchmarks/deploy.py --model tiny --out deploy_tiny.csv
    python tests/benchmarks/deploy.py --model sd15 --out deploy_sd15.csv   # random weights, batch 2, 64x64

First every model is made and saved, in a process of its own: `make_gib` is that process's peak memory. Ours
and NNCF's are calibrated on the same `--calls` inputs, and have the same inputs of dynamic size. Then each
engine is loaded in a process of its own, and as many as fit into `--memory` GiB take turns, step by step.
Float32 and NNCF's model always take part, and ratios are taken within a round. OpenVINO and our kernels also
run with bfloat16 between the integers; such an engine is compared with NNCF's model in bfloat16. "int8
scores" multiplies attention's queries and keys in integers too, as NNCF's model does. "7-bit weights" are for
CPUs without VNNI.

The table is written after each result. A run that was killed goes on from it and from the files in
`--folder`. "10 % removed" takes away about a tenth of each group's units, in widths of multiples of 8; its
time does not depend on which units they are. Needs the `deploy` and `peers` extras; NNCF at Stable Diffusion
1.5's size needs 13 GiB of memory.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
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
    peak_memory,
)
from torch import Tensor, nn

from sdcomp.evaluation import macs
from sdcomp.evaluation.timing import median
from sdcomp.export import export, load_openvino
from sdcomp.integer import load_int8, save_int8, to_int8
from sdcomp.model import StableDiffusion
from sdcomp.model.channel_map import apply_channel_map
from sdcomp.model.prune_groups import prune_groups

# Models are made


def smaller(unet: nn.Module, amount: float, multiple: int = 8) -> nn.Module:
    """Remove the last units of each group, in place; returns the UNet."""
    kept = {}
    for group in prune_groups(unet):
        if group.rows:
            layer, _, _, repeats = next(group.slices(unet))
            width = len(layer.weight) // (group.units * repeats)
            step = multiple // math.gcd(multiple, width)
            removed = round(amount * group.units / step) * step
            kept[group.name] = list(range(group.units - removed))
    return apply_channel_map(unet, {name: units for name, units in kept.items() if units})


def quantized(model: str, calls: int, amount: float, scores: bool = False, weight_bits: int = 8) -> nn.Module:
    unet = smaller(build(model), amount) if amount else build(model)
    settings = {"weight_quant_params": {"n_bits": weight_bits}}
    if scores:
        settings["quantize_attention_products"] = "scores"
    return calibrated(unet, *(inputs(model, seed) for seed in range(calls)), **settings)


def our_int8(
    model: str,
    folder: Path,
    calls: int,
    amount: float = 0.0,
    dtype: torch.dtype = torch.float32,
    weight_bits: int = 8,
) -> None:
    q = quantized(model, calls, amount, weight_bits=weight_bits)
    save_int8(to_int8(q, dtype, execution="kernels"), folder)


def our_export(
    model: str,
    folder: Path,
    calls: int,
    file: str,
    amount: float = 0.0,
    scores: bool = False,
    weight_bits: int = 8,
) -> None:
    unet = quantized(model, calls, amount, scores, weight_bits)
    sd = StableDiffusion(MODELS[model][0], unet, *[None] * 4)  # no other parts
    export(sd, folder / file, format={"unet.xml": "openvino", "unet.onnx": "onnx"}[file])


def exported_inputs(model: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as an exported UNet takes them: one timestep for all rows, in float32."""
    latents, timesteps, context = inputs(model, seed)
    return latents, timesteps[:1].float(), context


def nncf_export(model: str, folder: Path, calls: int) -> None:
    import nncf
    import openvino

    config = MODELS[model][0].unet
    shapes = ([-1, config.in_channels, -1, -1], [1], [-1, -1, config.context_dim])
    graph = openvino.convert_model(
        build(model),
        example_input=exported_inputs(model),
        input=[openvino.PartialShape(shape) for shape in shapes],
    )
    data = nncf.Dataset([[part.numpy() for part in exported_inputs(model, seed)] for seed in range(calls)])
    graph = nncf.quantize(graph, data, subset_size=calls, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(graph, folder / "unet.xml", compress_to_fp16=False)


# Models are run


def run_int8(model: str, folder: str, name: str) -> Step:
    unet, call = load_int8(Path(folder, name), execution="kernels"), inputs(model)
    return lambda: unet(*call)


def run_openvino(model: str, folder: str, name: str, dtype: torch.dtype = torch.float32) -> Step:
    unet, call = load_openvino(Path(folder, name, "unet.xml"), dtype), exported_inputs(model)
    return lambda: unet(*call)


def run_onnx(model: str, folder: str, name: str) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(Path(folder, name, "unet.onnx"), options)
    names = [i.name for i in session.get_inputs()]
    feed = dict(zip(names, (part.numpy() for part in exported_inputs(model)), strict=True))
    return lambda: session.run(None, feed)


@dataclass(frozen=True)
class Engine:
    """`run(model, folder)` loads a step; `make(model, folder, calls)` first writes what it loads."""

    run: Callable[[str, str], Step]
    make: Callable[[str, Path, int], None] | None = None


BETWEEN = ", bfloat16 between"
NNCF = "nncf, openvino"
REMOVED = ", 10 % removed"
SCORES = ", int8 scores"
NARROW = ", 7-bit weights"


def engines() -> Iterator[tuple[str, Engine]]:
    """Yield each engine with its name; the types in between share a file where they can."""
    yield REFERENCE, Engine(fp32)
    exports = {NNCF: nncf_export}
    for scores in (False, True):
        for part, amount in (("", 0.0), (REMOVED, 0.1)):
            made = "sdcomp export, openvino" + SCORES * scores + part
            exports[made] = partial(our_export, file="unet.xml", amount=amount, scores=scores)
    for made, make in exports.items():
        yield made, Engine(partial(run_openvino, name=made), make)
        yield made + BETWEEN, Engine(partial(run_openvino, name=made, dtype=torch.bfloat16))
    for part, amount in (("", 0.0), (REMOVED, 0.1)):
        for between, dtype in (("", torch.float32), (BETWEEN, torch.bfloat16)):
            made, make = "sdcomp int8" + part + between, partial(our_int8, amount=amount, dtype=dtype)
            yield made, Engine(partial(run_int8, name=made), make)
    made = "sdcomp export, onnxruntime"
    yield made, Engine(partial(run_onnx, name=made), partial(our_export, file="unet.onnx"))
    for name, run, make in (
        ("sdcomp int8", run_int8, our_int8),
        ("sdcomp export, openvino", run_openvino, partial(our_export, file="unet.xml")),
        ("sdcomp export, onnxruntime", run_onnx, partial(our_export, file="unet.onnx")),
    ):
        made = name + NARROW
        yield made, Engine(partial(run, name=made), partial(make, weight_bits=7))
    yield "diffusers fp32", Engine(diffusers_eager)


ENGINES = dict(engines())
REFERENCES = (REFERENCE, NNCF, NNCF + BETWEEN)
COLUMNS = (
    "make_seconds", "make_gib", "file_gb", "arithmetic_left", "seconds", "seconds_low", "seconds_high",
    "speedup", "speedup_low", "speedup_high", "of_nncf", "of_nncf_low", "of_nncf_high", "peak_gib",
    "load_seconds", "n", "note",
)  # fmt: skip


def make_and_report(
    make: Callable, model: str, folder: Path, calls: int, threads: int, pipe: Connection
) -> None:
    """The process that makes a model: sends its seconds, its peak memory and the bytes of its files."""
    torch.set_num_threads(threads)
    try:
        begin = time.perf_counter()
        with torch.no_grad():
            make(model, folder, calls)
        files = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        made = {"make_seconds": time.perf_counter() - begin, "make_gib": peak_memory() / 2**30}
        pipe.send({**made, "file_gb": files / 1e9, "note": ""})
    except Exception as error:  # a peer's failure is a line of the table, whatever it is
        pipe.send({"note": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"})


def made(make: Callable, model: str, folder: Path, *args: object) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    there, here = multiprocessing.Pipe()
    process = multiprocessing.Process(target=make_and_report, args=(make, model, folder, *args, here))
    process.start()
    here.close()
    try:
        answer = there.recv()
    except EOFError:
        answer = {"note": "its process was killed; is there enough memory?"}
    process.join()
    return answer


class Table:
    """The rows, by the name of the engine; written to a file after each change, and read from it at first."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, {}
        if path is not None and path.exists():
            read = pd.read_csv(path, index_col="variant")
            self.rows = {name: {k: v for k, v in row.items() if pd.notna(v)} for name, row in read.T.items()}

    def put(self, name: str, values: dict[str, object]) -> None:
        self.rows[name] = {**self.rows.get(name, {}), **values}
        print(name, values, flush=True)
        if self.path is not None:
            partial_ = self.path.with_suffix(".partial")
            self.frame().to_csv(partial_, float_format="%.6g")
            partial_.replace(self.path)

    def has(self, name: str, column: str) -> bool:
        return column in self.rows.get(name, {})

    def frame(self) -> pd.DataFrame:
        rows = {name: self.rows[name] for name in ENGINES if name in self.rows}
        return pd.DataFrame(list(rows.values()), index=pd.Index(rows, name="variant"), columns=COLUMNS)


def take_turns(workers: dict[str, Worker], repeats: int) -> dict[str, dict[str, float]]:
    """Time the engines step by step, every second round backwards; a row for each."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    peaks = {}
    for turn in range(repeats):
        for name in list(workers) if turn % 2 == 0 else reversed(workers):
            elapsed, peaks[name] = workers[name].step()
            seconds[name].append(elapsed)
    times = {name: np.array(values) for name, values in seconds.items()}
    rows = {}
    for name, own in times.items():
        found = {"seconds": median(own), "speedup": median(times[REFERENCE], own)}
        if (peer := NNCF + BETWEEN * (BETWEEN in name)) in times:
            found["of_nncf"] = median(own, times[peer])
        row = {
            key + end: getattr(x, part)
            for key, x in found.items()
            for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        load = workers[name].loading["load_seconds"]
        rows[name] = {**row, "peak_gib": peaks[name] / 2**30, "load_seconds": load, "n": repeats, "note": ""}
    return rows


def time_all(names: list[str], start: Callable[[str], Worker], memory: float, repeats: int, table: Table):
    """Time engines in groups that fit into `memory` bytes, each group together with the references."""
    if all(table.has(name, "seconds") for name in names):
        return

    def load(name: str) -> Worker | None:
        worker = start(name)
        if worker.failed:
            table.put(name, {"note": worker.failed})
        return None if worker.failed else worker

    references = {name: worker for name in REFERENCES if name in names and (worker := load(name))}
    waiting = [name for name in names if name not in references and not table.has(name, "seconds")]
    first = not all(table.has(name, "seconds") for name in references)
    while waiting or first:
        workers = dict(references)
        used = sum(worker.step()[1] for worker in workers.values())
        while waiting:
            worker = load(waiting[0])
            if worker is None:
                waiting.pop(0)
                continue
            used += worker.step()[1]
            if used > memory and len(workers) > len(references):
                worker.stop()
                break
            workers[waiting.pop(0)] = worker
        for name, row in take_turns(workers, repeats).items():
            if name not in references or first:
                table.put(name, row)
        first = False
        for name in workers.keys() - references.keys():
            workers[name].stop()
    for worker in references.values():
        worker.stop()


def arithmetic_left(model: str) -> float:
    """The share of the multiply-accumulates that removal leaves."""
    with torch.device("meta"):
        call = [part.to("meta") for part in inputs(model)]
        return macs(smaller(build(model), 0.1), *call) / macs(build(model), *call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--variants", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--calls", type=int, default=2, help="inputs of the calibration")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", type=float, default=17.0, help="GiB of engines that take turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="of the models' files; default: reports/runs/deploy")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    folder = args.folder or Path("reports/runs/deploy", args.model)
    table = Table(args.out)
    names = [name for name in ENGINES if name in (*args.variants, REFERENCE)]
    for name in names:
        make, files = ENGINES[name].make, folder / name
        if make and not (table.has(name, "make_seconds") and files.exists()):
            left = {"arithmetic_left": arithmetic_left(args.model)} if "removed" in name else {}
            table.put(name, {**left, **made(make, args.model, files, args.calls, args.threads)})
    ready = [name for name in names if not ENGINES[name].make or table.has(name, "make_seconds")]

    def start(name: str) -> Worker:
        return Worker(ENGINES[name].run, args.model, str(folder), args.threads)

    time_all(ready, start, args.memory * 2**30, args.repeats, table)
    print(table.frame().to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
