"""Second-order rounding or pruning of a UNet of Stable Diffusion 1.5's size: its time and its memory.

    python tests/benchmarks/second_order.py --threads 2 --out second_order_sd15.csv
    python tests/benchmarks/second_order.py --threads 2 --zeros 0.5 --out pruning_second_order_sd15.csv

Weights are random: memory does not depend on them, and time hardly does. The layers' inputs are observed in a
few UNet calls on random latents, once for each part of the layers whose second moments fit into `--memory`
GiB. `--zeros` prunes instead. With `--checkpoint` a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import resource
import time
from pathlib import Path

import torch

import sdcomp
from sdcomp.model.unet import UNet
from sdcomp.pruning import calibrate, count_zeros, prune_unstructured
from sdcomp.quantization import apply_recipe, build


def main() -> None:
    """Round the UNet, and write one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--recipe", default="weights_gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--zeros", type=float, help="share of each layer's weights to prune; then nothing is rounded"
    )
    parser.add_argument("--calls", type=int, default=4, help="UNet calls that are observed")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB of second moments at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = (sdcomp.SD15 if args.config == "sd15" else sdcomp.TINY).unet
    unet = UNet(config).eval().requires_grad_(False)
    side = 64 if args.config == "sd15" else 16
    timesteps = torch.linspace(999, 0, args.calls).long().tolist()
    inputs = [(torch.randn(2, 4, side, side), t, torch.randn(2, 77, config.context_dim)) for t in timesteps]
    model = unet if args.zeros else build(args.recipe, unet, args.bits)
    passes = 0

    def run() -> None:
        nonlocal passes
        passes += 1
        for latents, timestep, context in inputs:
            model(latents, timestep, context)
            print(f"{time.monotonic() - start:.0f} s: pass {passes}, timestep {timestep}", flush=True)

    start, memory, pruned = time.monotonic(), args.memory * 2**30, unet
    if args.zeros:
        calibration = calibrate(unet, run, gradients=False, memory=memory)
        how = {"importance": "second_order", "calibration": calibration, "checkpoint": args.checkpoint}
        pruned = prune_unstructured(unet, args.zeros, inputs=f"{args.calls} calls", **how)
    else:
        apply_recipe(model, args.recipe, run, memory=memory, checkpoint=args.checkpoint, inputs="benchmark")
    row = {
        "config": args.config, "recipe": "second-order pruning" if args.zeros else args.recipe,
        "bits": "" if args.zeros else args.bits, "zeros": round(count_zeros(pruned).zero_fraction, 3),
        "calls": args.calls,
        "passes": passes, "threads": args.threads, "seconds": round(time.monotonic() - start, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    print(row)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
