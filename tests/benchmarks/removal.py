"""Images after removal of channels and blocks: this package beside Torch-Pruning, on the tiny model.

    python tests/benchmarks/removal.py --out removal.csv

Every variant generates the same prompts from the same noise as the whole UNet. Differences are paired, with
95 % intervals. "sdcomp" removes equal shares of all groups by magnitude; "sdcomp cheapest" removes what costs
least for its multiply-accumulates. Torch-Pruning removes more at one amount (`torch_pruning_remove` says
why), so each variant is also compared with Torch-Pruning's variant of the nearest multiply-accumulates.
Torch-Pruning needs the `peers` extra.
"""

from __future__ import annotations

import argparse
import copy

import pandas as pd
import torch
from pruning import example, torch_pruning_remove

import sdcomp
from sdcomp.evaluation import (
    Estimate,
    estimate,
    layer_profile,
    load_prompts,
    macs,
    paired_difference,
    scores,
)
from sdcomp.pruning import calibrate, prune_structured, remove_cheapest

METRIC = "prompt accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--ours", type=float, nargs="+", default=[0.1, 0.25, 0.45])
    parser.add_argument("--cheapest", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--theirs", type=float, nargs="+", default=[0.01, 0.02, 0.1])
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    sd = sdcomp.load("data/tiny")
    prompts = load_prompts(sd, "test", options.images)
    call = example(small=True)

    def judge(unet: torch.nn.Module) -> torch.Tensor:
        images = sd.replace(unet=unet).generate(prompts.texts, seed=0, steps=20, progress=True)
        return scores(sd, images, prompts)[METRIC]

    def torch_pruning(amount: float) -> torch.nn.Module:
        with torch.enable_grad():
            unet = torch_pruning_remove(copy.deepcopy(sd.unet).requires_grad_(True), True, amount)
        return unet.requires_grad_(False)

    whole, work = judge(sd.unet), macs(sd.unet, *call)
    rows, found = [], {}

    def show(value: Estimate, name: str) -> dict[str, float]:
        return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}

    def report(method: str, amount: float, unet: torch.nn.Module) -> None:
        own = found[method, amount] = judge(unet)
        rows.append(
            {
                "method": method,
                "amount": amount,
                "macs": macs(unet, *call) / work,
                "parameters": sum(p.numel() for p in unet.parameters()),
                **show(estimate(own, prompts.groups), "accuracy"),
                **show(paired_difference(own, whole, prompts.groups), "difference"),
                "n": len(own),
            }
        )
        print(rows[-1], flush=True)

    for amount in options.theirs:
        report("torch-pruning", amount, torch_pruning(amount))
    peers = list(rows)
    calibration = calibrate(sd.unet, lambda: sd.generate(load_prompts(sd, "calibration", 32).texts, seed=1))
    operations = layer_profile(sd.unet, *call).set_index("name")["flops"].to_dict()
    variants = [("sdcomp", amount, prune_structured(sd.unet, amount, "remove")) for amount in options.ours]
    for amount in options.cheapest:
        smaller = remove_cheapest(sd.unet, amount, calibration, costs=operations)
        variants.append(("sdcomp cheapest", amount, smaller))
    for method, amount, unet in variants:
        report(method, amount, unet)
        nearest = min(peers, key=lambda peer: abs(peer["macs"] - rows[-1]["macs"]))
        against = found["torch-pruning", nearest["amount"]]
        change = paired_difference(found[method, amount], against, prompts.groups)
        rows[-1] |= {"beside": nearest["amount"], **show(change, "advantage")}
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
