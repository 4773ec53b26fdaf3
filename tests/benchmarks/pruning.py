"""Cost and gain of pruning: this package beside torch.nn.utils.prune and Torch-Pruning.

    python tests/benchmarks/pruning.py --out pruning.csv            # SD 1.5's UNet, random weights
    python tests/benchmarks/pruning.py --small --out pruning.csv    # the tiny model's

It asks two questions. How long does pruning take, and how much memory does it need beside the UNet? If
removal saves a share of the multiply-accumulates, what share of the time does it save? Each method runs in
its own process, so its peak memory is its own. Steps of the whole and of the smaller UNet are timed in turn,
so drift cancels. Torch-Pruning needs the `peers` extra.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import prune

from sdcomp.evaluation.profile import macs
from sdcomp.evaluation.timing import median
from sdcomp.model import SD15, TINY
from sdcomp.model.unet import UNet
from sdcomp.pruning import count_zeros, prune_structured, prune_unstructured
from sdcomp.pruning.layers import prunable_layers


def torch_unstructured(unet: nn.Module, amount: float) -> None:
    for layer in prunable_layers(unet).values():
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                prune.l1_unstructured(layer, name, amount)
                prune.remove(layer, name)


def torch_global(unet: nn.Module, amount: float) -> None:
    tensors = [
        (layer, name) for layer in prunable_layers(unet).values() for name in ("weight", "bias")
        if getattr(layer, name) is not None
    ]  # fmt: skip
    prune.global_unstructured(tensors, prune.L1Unstructured, amount=amount)
    for layer, name in tensors:
        prune.remove(layer, name)


def torch_structured(unet: nn.Module, amount: float) -> None:
    for layer in prunable_layers(unet).values():
        prune.ln_structured(layer, "weight", amount, n=2, dim=0)
        prune.remove(layer, "weight")


def second_order(unet: UNet, amount: float) -> None:
    """Second-order pruning stage by stage, so that the moments of one stage at a time are in memory."""
    args = example(small=unet.config == TINY.unet)

    def run() -> None:
        with torch.no_grad():
            unet(*args)

    stages = [
        f"{part}.{i}" for part in ("input_blocks", "output_blocks") for i in range(len(getattr(unet, part)))
    ]
    for stage in [*stages, "middle_block"]:
        prune_unstructured(
            unet, amount, importance="second_order", calibration=run, parts=[stage], inplace=True
        )


PRUNING: dict[str, tuple[str, Callable[[nn.Module, float], object]]] = {
    "sdcomp unstructured": ("layer", lambda u, a: prune_unstructured(u, a, inplace=True)),
    "torch l1_unstructured": ("layer", torch_unstructured),
    "sdcomp global": ("global", lambda u, a: prune_unstructured(u, a, "global", inplace=True)),
    "torch global_unstructured": ("global", torch_global),
    "sdcomp second order": ("layer", second_order),
    "sdcomp mask": ("mask", lambda u, a: prune_structured(u, a, inplace=True)),
    "torch ln_structured": ("mask", torch_structured),
    "sdcomp remove": ("remove", lambda u, a: prune_structured(u, a, "remove", inplace=True)),
}


def build(small: bool) -> UNet:
    torch.manual_seed(0)
    return UNet((TINY if small else SD15).unet).eval().requires_grad_(False)


def example(small: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One guided step: batch 2, latents of the model's own image size."""
    config = TINY if small else SD15
    side = config.image_size // config.vae.downsampling
    length = config.text["max_position_embeddings"]
    return (
        torch.randn(2, 4, side, side),
        torch.full((2,), 500),
        torch.randn(2, length, config.unet.context_dim),
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def measure_pruning(method: str, small: bool, amount: float) -> dict[str, object]:
    kind, function = PRUNING[method]
    unet = build(small)
    before = peak_mib()
    start = time.perf_counter()
    function(unet, amount)
    seconds = time.perf_counter() - start
    count = count_zeros(unet)
    return {
        "kind": kind, "seconds": seconds, "extra_peak_MiB": peak_mib() - before,
        "parameters": count.total, "nonzero": count.nonzero,
    }  # fmt: skip


def torch_pruning_remove(unet: UNet, small: bool, amount: float, taylor: bool = False) -> UNet:
    """Torch-Pruning on the same blocks, at the same amount and with the same criterion.

    With `taylor` the criterion is weight times gradient instead, from the gradients that the UNet has.

    It also narrows the residual connections, and it cuts a gated feed-forward network by more than the
    amount. So it removes more at one amount: compare at equal multiply-accumulates.
    """
    import torch_pruning as tp

    attentions = [m for m in unet.modules() if type(m).__name__ == "CrossAttention"]
    importance = (
        tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    )
    pruner = tp.pruner.BasePruner(
        unet,
        example(small),
        importance=importance,
        pruning_ratio=amount,
        num_heads={layer: m.heads for m in attentions for layer in (m.to_q, m.to_k, m.to_v)},
        prune_num_heads=True,
        head_pruning_ratio=amount,
        ignored_layers=[unet.time_embed, unet.out[2]],
    )
    pruner.step()
    for m in attentions:
        m.heads = pruner.num_heads[m.to_q]
    return unet


@torch.inference_mode()
def measure_removal(method: str, small: bool, amount: float, repeats: int) -> dict[str, object]:
    whole = build(small)
    if method == "torch-pruning":
        with torch.inference_mode(False), torch.enable_grad():
            smaller = torch_pruning_remove(build(small).requires_grad_(True), small, amount)
            smaller.requires_grad_(False)
    elif method == "mask":
        smaller = prune_structured(whole, amount)
    else:
        smaller = prune_structured(whole, amount, "remove")
    args = example(small)
    times: dict[str, list[float]] = {"whole": [], "smaller": []}
    for repeat in range(repeats + 1):
        for name, unet in (("whole", whole), ("smaller", smaller)):
            start = time.perf_counter()
            unet(*args)
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    work = macs(smaller, *args) / macs(whole, *args)
    left = median(np.array(times["smaller"]), np.array(times["whole"]))
    return {
        "kind": "step",
        "step_whole_s": median(np.array(times["whole"])).value,
        "step_smaller_s": median(np.array(times["smaller"])).value,
        "parameters": count_zeros(smaller).total,
        "macs_saved": 1 - work,
        "time_saved": 1 - left.value,
        "time_saved_low": 1 - left.high,
        "time_saved_high": 1 - left.low,
        "time_saved_per_macs_saved": (1 - left.value) / (1 - work) if work < 1 else None,
        "repeats": repeats,
    }


def _child(pipe, function: Callable[..., dict[str, object]], args: tuple) -> None:
    try:
        pipe.send(function(*args))
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def apart(function: Callable[..., dict[str, object]], *args: object) -> dict[str, object]:
    """Run `function` in its own process and return its result; report a process that dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    return result or {"failed": f"the process died with exit code {process.exitcode}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the tiny model's UNet instead of SD 1.5's")
    parser.add_argument("--amount", type=float, default=0.3, help="of the pruning that is timed")
    parser.add_argument("--removed", type=float, nargs="*", default=[0.25, 0.5], help="amounts of removal")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed, after one to warm up")
    parser.add_argument("--methods", nargs="*", default=list(PRUNING), choices=PRUNING, help="timed prunings")
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    model = "base" if options.small else "SD 1.5"
    rows = []

    def report(method: str, amount: float, result: dict[str, object]) -> None:
        rows.append({"model": model, "method": method, "amount": amount, **result})
        print(rows[-1], flush=True)

    for method in options.methods:
        result = apart(measure_pruning, method, options.small, options.amount)
        report(method, options.amount, {"kind": PRUNING[method][0], **result})
    for amount in options.removed:
        for method in ("remove", "mask", "torch-pruning"):
            report(method, amount, apart(measure_removal, method, options.small, amount, options.repeats))
    table = pd.DataFrame(rows).assign(threads=torch.get_num_threads(), torch=torch.__version__)
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
