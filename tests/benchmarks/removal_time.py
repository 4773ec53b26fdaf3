"""Removal that is chosen by the time that it saves: the time of a UNet call, and the images.

    python tests/benchmarks/removal_time.py --amounts 0.2 0.22 0.24 --out reports/benchmarks/removal_time.csv

Channels, heads and blocks of the tiny model compete (`remove_cheapest`). A layer costs the seconds that it
takes in a call with `--rows` rows; widths are multiples of `--multiple`. Nothing is trained. Calls of the
whole and of the smaller UNets are timed in turn, every second round backwards. Differences are paired, with
95 % intervals.
"""

from __future__ import annotations

import argparse
from functools import partial

import pandas as pd
import torch

import sdcomp
from sdcomp.evaluation import (
    estimate,
    interleaved_times,
    layer_profile,
    load_prompts,
    macs,
    median,
    paired_difference,
    scores,
)
from sdcomp.pruning import calibrate, remove_cheapest

METRIC = "prompt accuracy"
PROFILES = 3
"""Profiles whose mean is a layer's cost."""


def main() -> None:
    """Measure each amount on each set of prompts, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.2, 0.22, 0.24])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--multiple", type=int, default=8)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--splits", nargs="+", default=["test", "final"])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="CSV file for the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = sdcomp.load("data/tiny")
    config = sd.config.unet
    latents = torch.randn(args.rows, config.in_channels, 16, 16)
    call = latents, torch.full((args.rows,), 500), torch.randn(args.rows, 24, config.context_dim)
    profiles = [layer_profile(sd.unet, *call).set_index("name")["seconds"] for _ in range(PROFILES)]
    costs = (sum(profiles) / PROFILES).to_dict()
    calibrating = load_prompts(sd, "calibration", 32).texts
    calibration = calibrate(sd.unet, lambda: sd.generate(calibrating, seed=1))
    smaller = {
        amount: remove_cheapest(sd.unet, amount, calibration, costs=costs, multiple=args.multiple)
        for amount in args.amounts
    }
    calls = {amount: partial(unet, *call) for amount, unet in {0.0: sd.unet, **smaller}.items()}
    with torch.no_grad():
        seconds = interleaved_times(calls, args.repeats, warmup=4)
    rows = []
    for split in args.splits:
        prompts = load_prompts(sd, split, args.images)
        whole = scores(sd, sd.generate(prompts.texts), prompts)[METRIC]
        for amount, unet in smaller.items():
            own = scores(sd, sd.replace(unet=unet).generate(prompts.texts), prompts)[METRIC]
            change, left = (
                paired_difference(own, whole, prompts.groups),
                median(seconds[amount], seconds[0.0]),
            )
            rows.append(
                {
                    "amount": amount, "split": split, "time": left.value, "time_low": left.low,
                    "time_high": left.high, "macs": macs(unet, *call) / macs(sd.unet, *call),
                    "parameters": sum(p.numel() for p in unet.parameters()),
                    "accuracy": estimate(own, prompts.groups).value, "difference": change.value,
                    "low": change.low, "high": change.high, "n": len(own), "calls": args.repeats,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    if args.out:
        pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
