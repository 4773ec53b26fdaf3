"""Why ranges of their own in ten timestep intervals lose images at W4A4: where they do, and what width does.

    python tests/benchmarks/interval_ranges.py --images 128 --out reports/benchmarks/interval_ranges.csv

The tiny model by the preset `mse` and by `timestep_mse` with ten intervals, each calibrated as in
`01_quantization`; both at once, divided at timestep 500; and each with other widths of all ranges. The
weights are the same, and the widest range of a layer's intervals is its plain range. `difference` is that of
the prompt accuracy to `mse`. `step_error` is the mean squared error of the guided noise along the unquantized
path, `gain` the signed error along the prediction from timestep 500 on, in percent (below zero, too little
noise is predicted), and `final_error` that of the final latents of the variant's own path: see
`sdcomp.evaluation.PathErrors`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import sdcomp
from sdcomp.evaluation import load_prompts, paired_difference, path_errors, psnr
from sdcomp.quantization import QuantModel, quantize
from sdcomp.scenes import prompt_accuracy

BITS, K, MIDDLE = 4, 10, 500


class Divided(nn.Module):
    """One UNet from timestep `MIDDLE` on, and another below it."""

    def __init__(self, noisy: nn.Module, clean: nn.Module) -> None:
        super().__init__()
        self.noisy, self.clean = noisy, clean

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        some = torch.as_tensor(timestep).max().item() >= MIDDLE
        return (self.noisy if some else self.clean)(latents, timestep, context)


def widened(model: QuantModel, factor: float) -> QuantModel:
    """The same model, with all input ranges `factor` times as wide."""
    for layer in model.quantized_layers():
        layer.set_act_scales(layer.act_scale * factor, layer.act_clipped)
    return model


def variants(sd: sdcomp.StableDiffusion, prompts: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the variants with their names, `mse` first. The widths change in place, at the end."""
    asked = {"weight_bits": BITS, "act_bits": BITS, "steps": 40, "seed": 1, "batch_size": 16}
    plain = quantize(sd, "mse", prompts, **asked)
    aware = quantize(sd, "timestep_mse", prompts, k=K, **asked)
    pairs = zip(aware.quantized_layers(), plain.quantized_layers(), strict=True)
    if not all(torch.equal(many.act_scale.amax(0), one.act_scale[0]) for many, one in pairs):
        raise RuntimeError("the widest range of a layer's intervals is not its plain range")
    yield "mse", plain
    yield "intervals", aware
    yield "intervals from timestep 500 on", Divided(aware, plain)
    yield "intervals below timestep 500", Divided(plain, aware)
    yield "intervals, ranges 1.25 times as wide", widened(aware, 1.25)
    yield "mse, ranges 0.8 times as wide", widened(plain, 0.8)


def main() -> None:
    """Measure every variant and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="data/tiny")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = sdcomp.load(args.model)
    test = load_prompts(sd, "test", args.images)
    calibration = load_prompts(sd, "calibration", 32).texts
    held_out = calibration[16:]
    baseline = sd.generate(test.texts, steps=20)
    _, trace = sd.generate(held_out, steps=20, trace=True)
    noisy = trace.timesteps >= MIDDLE
    rows, before = [], None
    for name, unet in variants(sd, calibration[:16]):
        images = sd.replace(unet=unet).generate(test.texts, steps=20)
        right = prompt_accuracy(sd.reader, images, test.scenes).all_right
        before = right if before is None else before
        change = paired_difference(right, before, test.groups)
        errors = path_errors(sd, unet, held_out, trace, steps=20)
        row = {"variant": name, "n": len(images), "accuracy": round(100 * right.double().mean().item(), 1)}
        ends = {"difference": change.value, "low": change.low, "high": change.high}
        row |= {end: round(value, 1) for end, value in ends.items()}
        row["psnr"] = round(psnr(images, baseline, test.groups).value, 1)
        row["step_error"] = round(errors.step.mean().item(), 3)
        row["gain"] = round(100 * errors.gain[noisy].mean().item(), 1)
        row["final_error"] = round(errors.final.mean().item(), 3)
        rows.append(row)
        print(row, flush=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
