"""One UNet step in integers: this package beside PyTorch, diffusers, torchao and OpenVINO.

    python tests/benchmarks/int8.py --model tiny --out int8.csv
    python tests/benchmarks/int8.py --model sd15 --out int8.csv     # random weights, batch 2, 64x64 latents

Every variant has a process of its own, so that peak memory is its own, and is timed in turn with the
float32 UNet in another process, so that drift cancels in the ratio. Peak memory is that of the whole
process, making the variant included; sdcomp's integer models are loaded from the files that they were saved
to. Peers need the `peers` extra; one that is not there, or fails, is left out with its reason.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sdcomp.evaluation.timing import median
from sdcomp.integer import load_int8, save_int8, to_int8
from sdcomp.model import SD15, TINY
from sdcomp.model.files.diffusers_config import unet_settings
from sdcomp.model.unet import UNet
from sdcomp.quantization import QuantModel

MODELS = {"tiny": (TINY, 16), "sd15": (SD15, 2)}  # configuration, rows


def inputs(model: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    config, rows = MODELS[model]
    side = config.image_size // config.vae.downsampling
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, config.unet.in_channels, side, side, generator=generator)
    length = config.text["max_position_embeddings"]
    context = torch.randn(rows, length, config.unet.context_dim, generator=generator)
    return latents, torch.full((rows,), 500), context


def build(model: str) -> UNet:
    torch.manual_seed(0)
    return UNet(MODELS[model][0].unet).eval().requires_grad_(False)


def calibrated(unet: nn.Module, *calls: tuple[Tensor, Tensor, Tensor], **settings: object) -> QuantModel:
    """A UNet quantized to 8 bits, calibrated on the largest magnitudes of some calls."""
    q = QuantModel(unet, **settings).set_use_quant(False, False)
    found: dict[str, Tensor] = {}

    def widest(layer: nn.Module, args: tuple[Tensor]) -> None:
        largest = args[0].abs().max()
        found[layer.name] = torch.maximum(largest, found.get(layer.name, largest))

    for layer in q.quantized_layers():
        layer.register_forward_pre_hook(widest)
    for call in calls:
        q(*call)
    for layer in q.quantized_layers():
        layer._forward_pre_hooks.clear()
        layer.set_act_scales(found[layer.name][None] / q.act_quantizer.qmax, torch.zeros(1))
    q.is_calibrated.fill_(True)
    return q.set_use_quant()


def save_models(model: str, folder: str) -> None:
    """The integer models, as files."""
    q = calibrated(build(model), inputs(model))
    for dtype in (torch.float32, torch.bfloat16):
        save_int8(to_int8(q, dtype, "kernels"), Path(folder) / str(dtype))


Step = Callable[[], object]


def fp32(model: str, folder: str) -> Step:
    unet, call = build(model), inputs(model)
    return lambda: unet(*call)


def bf16(model: str, folder: str) -> Step:
    unet, (latents, timesteps, context) = build(model).bfloat16(), inputs(model)
    call = latents.bfloat16(), timesteps, context.bfloat16()
    return lambda: unet(*call)


def int8(model: str, folder: str, dtype: torch.dtype = torch.float32) -> Step:
    unet, call = load_int8(Path(folder) / str(dtype), execution="kernels"), inputs(model)
    return lambda: unet(*call)


def int8_bf16(model: str, folder: str) -> Step:
    return int8(model, folder, torch.bfloat16)


def compiled(model: str, folder: str) -> Step:
    unet, call = torch.compile(build(model)), inputs(model)
    return lambda: unet(*call)


def diffusers_eager(model: str, folder: str) -> Step:
    from diffusers import UNet2DConditionModel

    config = MODELS[model][0]
    side = config.image_size // config.vae.downsampling
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_settings(config.unet, side)).eval().requires_grad_(False)
    call = inputs(model)
    return lambda: unet(*call)


def torchao_int8(model: str, folder: str) -> Step:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    unet, call = build(model), inputs(model)
    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return lambda: unet(*call)


def openvino(model: str, folder: str, precision: str) -> Step:
    import openvino

    call = inputs(model)
    graph = openvino.convert_model(build(model), example_input=call)
    arrays = [part.numpy() for part in call]
    if precision == "int8":
        import nncf

        graph = nncf.quantize(
            graph, nncf.Dataset([arrays]), subset_size=1, model_type=nncf.ModelType.TRANSFORMER
        )
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    ready = openvino.compile_model(graph, "CPU", {**hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda: ready(arrays)


VARIANTS: dict[str, Callable[[str, str], Step]] = {
    "sdcomp fp32": fp32,
    "sdcomp bf16": bf16,
    "sdcomp int8": int8,
    "sdcomp int8, bf16 between": int8_bf16,
    "sdcomp fp32, torch.compile": compiled,
    "diffusers fp32": diffusers_eager,
    "torchao int8, linears only": torchao_int8,
    "openvino fp32": partial(openvino, precision="fp32"),
    "openvino bf16": partial(openvino, precision="bf16"),
    "openvino int8": partial(openvino, precision="int8"),
}
REFERENCE = "sdcomp fp32"


def serve(make: Callable[[str, str], Step], model: str, folder: str, threads: int, pipe: Connection) -> None:
    """A variant's process: a step each time it is asked, its time and the peak memory so far as answer."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)

    def seconds(function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    steps: list[Step] = []
    try:
        with torch.inference_mode():
            started = peak_memory()
            load = seconds(lambda: steps.append(make(model, folder)))
            pipe.send({"start_bytes": started, "load_seconds": load, "first_seconds": seconds(steps[0])})
            while pipe.recv():
                pipe.send((seconds(steps[0]), peak_memory()))
    except ImportError as error:
        pipe.send(f"{error.name} is not installed")
    except Exception as error:  # a peer's failure is a line of the table, whatever it is
        pipe.send(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")


def peak_memory() -> int:
    """The most bytes that this process has had in memory so far, pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    if found := re.search(r"VmHWM:\s*(\d+) kB", status):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Worker:
    """A variant in a process; `failed` says why there is none, `loading` how long that took."""

    def __init__(self, make: Callable[[str, str], Step], *args: object) -> None:
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(make, *args, there), daemon=True)
        self.process.start()
        there.close()
        answer = self._answer()
        self.failed = answer if isinstance(answer, str) else None
        self.loading = {} if self.failed else answer

    def step(self) -> tuple[float, int]:
        self.pipe.send(True)
        return self._answer()

    def _answer(self) -> object:
        try:
            return self.pipe.recv()
        except EOFError:
            return "its process was killed; is there enough memory?"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def measure(
    name: str, make: Callable[[str, str], Step] | None, reference: Worker, repeats: int, *args: object
) -> dict[str, object]:
    """One line of the table: seconds and gibibytes of a variant, and its speed against the reference's.

    `make` is None for the reference itself.
    """
    worker = reference if make is None else Worker(make, *args)
    if worker.failed:
        return {"variant": name, "note": worker.failed}
    own, baseline, peak = [], [], 0
    for _ in range(repeats):
        seconds, peak = worker.step()
        own.append(seconds)
        baseline.append(seconds if worker is reference else reference.step()[0])
    if worker is not reference:
        worker.stop()
    time_, ratio = median(np.array(own)), median(np.array(baseline), np.array(own))
    return {
        "variant": name,
        "seconds": time_.value,
        "seconds_low": time_.low,
        "seconds_high": time_.high,
        "speedup": ratio.value,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "peak_gib": peak / 2**30,
        **worker.loading,
        "n": repeats,
        "note": "",
    }


KINDS = {
    "scaled_dot_product": "attention, float32",
    "qconv": "convolutions, int8",
    "qlinear": "linear layers and convolutions as products, int8",
    "quantize|clamp|bitwise": "quantizing inputs",
    "norm": "norms",
    "gelu|silu|mul|add": "activations and sums",
    "copy|cat|pad|fill|upsample": "copies",
}


def where(model: str, folder: str, threads: int, pipe: Connection) -> None:
    """What operations a step of the integer model spends its time in: kind -> seconds, calls."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        step = int8(model, folder)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
    found = {kind: [0.0, 0] for kind in [*KINDS.values(), "the rest, calls from Python included"]}
    for event in profile.key_averages():
        kind = next((kind for names, kind in KINDS.items() if re.search(names, event.key)), list(found)[-1])
        found[kind][0] += event.self_cpu_time_total / 1e6
        found[kind][1] += event.count
    pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--runs", type=int, default=1, help="all of it so often, in new processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--keep", help="folder for the integer models' files, which a next run then uses")
    parser.add_argument("--out", help="CSV file for the table")
    parser.add_argument("--where", help="CSV file for where an int8 step's time goes; runs nothing else")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or temporary
        wanted = any("sdcomp int8" in name for name in args.variants)
        if wanted and not (Path(folder) / str(torch.bfloat16) / "int8.json").exists():
            process = multiprocessing.Process(target=save_models, args=(args.model, folder))
            process.start()
            process.join()
        settings = (args.model, folder, args.threads)
        if args.where:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=where, args=(*settings, sender))
            process.start()
            table = pd.DataFrame(receiver.recv(), index=["seconds", "calls"]).T.rename_axis("kind")
            process.join()
            table["share"] = table.seconds / table.seconds.sum()
            print(table)
            table.to_csv(args.where)
            return
        rows = []
        for run in range(args.runs):
            reference = Worker(fp32, *settings)
            for name in args.variants:
                make = None if name == REFERENCE else VARIANTS[name]
                row = measure(name, make, reference, args.repeats, *settings)
                rows.append({"run": run + 1, **row})
                print(rows[-1], flush=True)
            reference.stop()
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    if args.out:
        table.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
