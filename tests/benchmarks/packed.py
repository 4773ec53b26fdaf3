"""One UNet step on packed n-bit weights beside float32: file size, time to load, step time, peak memory.

    python tests/benchmarks/packed.py --model tiny --out packed.csv
    python tests/benchmarks/packed.py --model sd15 --out packed.csv   # random weights, batch 2, 64x64 latents

As in `int8.py`, every variant has a process of its own and is timed in turn with the float32 UNet in another
one. `weights_gib`: peak memory beyond what the process had before loading and what float32 needs for
activations, which is its own peak less its weights. Pages of the mapped file count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from int8 import MODELS, REFERENCE, Step, Worker, build, fp32, inputs, measure

from sdcomp.integer import load_packed, save_packed, to_packed
from sdcomp.quantization import QuantModel

WEIGHTS = {
    "W4": {"n_bits": 4},
    "W4 in groups of 64": {"n_bits": 4, "granularity": "group"},
    "W3 in groups of 64": {"n_bits": 3, "granularity": "group"},
    "W8": {"n_bits": 8},
}
FILES = ("packed.json", "packed.safetensors")


def save_model(model: str, name: str, folder: Path) -> None:
    """Round random weights to nearest and write them packed."""
    # In half precision, as published weights are, so that what is not quantized is stored in it.
    unet = build(model).half().float()
    save_packed(to_packed(QuantModel(unet, weight_quant_params=WEIGHTS[name], act_quant_params=None)), folder)


def packed(model: str, folder: str, name: str, dtype: torch.dtype) -> Step:
    unet, call = load_packed(Path(folder, name), dtype=dtype), inputs(model)
    return lambda: unet(*call)


def weights_gib(row: dict[str, object], reference: dict[str, object], model: str) -> float:
    """Peak memory of a variant beyond its start and the activations."""
    with torch.device("meta"):
        plain = 4 * sum(p.numel() for p in build(model).parameters()) / 2**30
    own, other = (r["peak_gib"] - r["start_bytes"] / 2**30 for r in (row, reference))
    return own - (other - plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["W4"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="CSV file for the table")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.weights:
            process = multiprocessing.Process(target=save_model, args=(args.model, name, Path(folder, name)))
            process.start()
            process.join()
        settings = (args.model, folder, args.threads)
        reference = Worker(fp32, *settings)
        rows = [measure(REFERENCE, None, reference, args.repeats, *settings)]
        for name in args.weights:
            for dtype in args.dtypes:
                make = partial(packed, name=name, dtype=getattr(torch, dtype))
                row = measure(f"{name}, {dtype}", make, reference, args.repeats, *settings)
                row["file_gb"] = sum((Path(folder, name) / file).stat().st_size for file in FILES) / 1e9
                if not row["note"]:
                    row["weights_gib"] = weights_gib(row, rows[0], args.model)
                rows.append(row)
                print(row, flush=True)
        reference.stop()
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.4f"))
    if args.out:
        table.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
