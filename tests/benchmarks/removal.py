"""Images after removal of channels, heads and blocks: this package beside Torch-Pruning and Diff-Pruning.

    python tests/benchmarks/removal.py --macs 0.75 --recover 100 --out reports/benchmarks/removal.csv

All variants of the tiny model have at most a share `--macs` of the UNet's multiply-accumulates and equal
recovery, and generate the same prompts from the same noise. Differences to the whole UNet are paired, with
95 % intervals. "magnitude" and "second order" remove equal shares of all groups, "cheapest" what costs least
for its multiply-accumulates. Diff-Pruning (Fang et al. 2023) is Torch-Pruning by weight times gradient of the
diffusion loss, summed over the timesteps whose loss is at least 5 % of the largest. Both need the extra
`peers`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from pruning import example, torch_pruning_remove
from torch import nn

import sdcomp
from sdcomp.evaluation import Estimate, estimate, layer_profile, load_prompts, macs, paired_difference, scores
from sdcomp.pruning import calibrate, prune_structured, remove_cheapest
from sdcomp.scenes import render
from sdcomp.training import recover

METRIC = "prompt accuracy"
LEAST_LOSS = 0.05


def diffusion_gradients(sd: sdcomp.StableDiffusion, count: int = 64) -> nn.Module:
    """A copy of the UNet with Diff-Pruning's gradients, from rendered scenes."""
    prompts = load_prompts(sd, "calibration", count)
    images = render(prompts.scenes, 0).float() / 255
    mean, _ = sd.encoder(2 * images - 1)
    latents, context = sd.config.vae.latent_scale * mean, sd.encode_prompts(prompts.texts)
    generator, largest = torch.Generator().manual_seed(0), 0.0
    with torch.inference_mode(False), torch.enable_grad():
        unet = copy.deepcopy(sd.unet).requires_grad_(True)
        latents, context = latents.detach().clone(), context.detach().clone()
        for timestep in range(0, sd.config.schedule.train_timesteps, 50):
            noise = torch.randn(latents.shape, generator=generator)
            noisy = sd.schedule.add_noise(latents, noise, torch.full((count,), timestep))
            loss = F.mse_loss(unet(noisy, timestep, context), noise)
            largest = max(largest, loss.item())
            if loss.item() > LEAST_LOSS * largest:
                loss.backward()
    return unet


def peer(unet: nn.Module, taylor: bool, amount: float) -> nn.Module:
    """Torch-Pruning of a copy of a UNet, with its gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        smaller = copy.deepcopy(unet).requires_grad_(True)
        for own, other in zip(smaller.parameters(), unet.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.clone()
        smaller = torch_pruning_remove(smaller, True, amount, taylor).requires_grad_(False)
    for parameter in smaller.parameters():
        parameter.grad = None
    return smaller


def at_most(share: float, make: Callable[[float], nn.Module], cost: Callable[[nn.Module], float]) -> tuple:
    """The least amount, in percent steps, whose result costs at most `share`; and the result."""
    low, high = 1, 90
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(make(middle / 100)) <= share else (middle + 1, high)
    return low / 100, make(low / 100)


def main() -> None:
    """Measure every variant and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.75])
    parser.add_argument("--recover", type=int, default=0, help="training steps of every variant")
    parser.add_argument("--only", default="", help="a part of the names of the methods to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sd = sdcomp.load("data/tiny")
    prompts = load_prompts(sd, "test", options.images)
    calibrating = load_prompts(sd, "calibration", 64).texts
    call = example(small=True)
    work = macs(sd.unet, *call)
    operations = layer_profile(sd.unet, *call).set_index("name")["flops"].to_dict()
    calibration = calibrate(sd.unet, lambda: sd.generate(calibrating[:32], seed=1))
    removed = partial(prune_structured, sd.unet, mode="remove")
    methods = {
        "magnitude": lambda amount: removed(amount),
        "second order": lambda amount: removed(amount, importance="second_order", calibration=calibration),
        "cheapest": lambda amount: remove_cheapest(sd.unet, amount, calibration, costs=operations),
        "Torch-Pruning": partial(peer, sd.unet, False),
        "Diff-Pruning": partial(peer, diffusion_gradients(sd), True),
    }

    def judge(unet: nn.Module) -> torch.Tensor:
        return scores(sd, sd.replace(unet=unet).generate(prompts.texts, seed=0, steps=20), prompts)[METRIC]

    def show(value: Estimate, name: str) -> dict[str, float]:
        return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}

    whole, rows = judge(sd.unet), []
    for share in options.macs:
        for name, make in methods.items():
            if options.only not in name:
                continue
            amount, unet = at_most(share, make, lambda unet: macs(unet, *call) / work)
            left = {"macs": macs(unet, *call) / work, "parameters": sum(p.numel() for p in unet.parameters())}
            if options.recover:
                unet = recover(unet, sd, calibrating, options.recover, lr=3e-4, progress=False).module
            own = judge(unet)
            change = paired_difference(own, whole, prompts.groups)
            row = {"method": name, "amount": amount, **left, "recovery_steps": options.recover}
            row |= show(estimate(own, prompts.groups), "accuracy") | show(change, "difference")
            rows.append({**row, "n": len(own)})
            print(rows[-1], flush=True)
            if options.out:
                pd.DataFrame(rows).to_csv(options.out, index=False)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
