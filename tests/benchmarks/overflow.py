"""How far int8 engines are from their simulation, by bits of the weights: sums overflow on CPUs without VNNI.

    python tests/benchmarks/overflow.py --out overflow.csv

The tiny model's UNet, ranges by `mse`, 8-bit inputs. Each engine gets the same `--calls` inputs of a
generation, at steps from the first to the last. Distances are means over these calls, in decibels:
`10 * log10(mean(reference ** 2) / mean((output - reference) ** 2))`. Needs the extra `deploy`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from torch import Tensor, nn

import sdcomp
from sdcomp.export import load_openvino
from sdcomp.quantization import quantize

PROMPTS = ["a large blue ring on a teal background", "a small red star on a navy background"]


def recorded(sd: sdcomp.StableDiffusion, count: int) -> list[tuple[Tensor, float, Tensor]]:
    """Arguments of UNet calls, spread over a generation."""
    calls = []
    handle = sd.unet.register_forward_pre_hook(lambda _, args: calls.append(args))
    sd.generate(PROMPTS, steps=count, batch_size=2)
    handle.remove()
    return [(latents, float(torch.as_tensor(t).flatten()[0]), context) for latents, t, context in calls]


def onnx_unet(file: Path) -> object:
    session = onnxruntime.InferenceSession(file)
    names = [i.name for i in session.get_inputs()]

    def run(latents: Tensor, timestep: float, context: Tensor) -> Tensor:
        arrays = (latents.numpy(), np.array([timestep], dtype=np.float32), context.numpy())
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


def decibels(output: Tensor, reference: Tensor) -> float:
    return (10 * torch.log10(reference.square().mean() / (output - reference).square().mean())).item()


def engines(sd: sdcomp.StableDiffusion, q: nn.Module, folder: Path) -> dict[str, object]:
    sd = sd.replace(unet=q)
    return {
        "simulation": q,
        "sdcomp int8": sdcomp.to_int8(q),
        "OpenVINO": load_openvino(sdcomp.export(sd, folder / "unet.xml", format="openvino")),
        "ONNX Runtime": onnx_unet(sdcomp.export(sd, folder / "unet.onnx", format="onnx")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--weight-bits", type=int, nargs="+", default=[8, 7])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sd = sdcomp.load("data/tiny")
    calls = recorded(sd, args.calls)
    rows = []
    for bits in args.weight_bits:
        q = quantize(sd, "mse", PROMPTS, weight_bits=bits, act_bits=8, steps=10)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            for name, unet in engines(sd, q, Path(folder)).items():
                outputs = [(unet(*call), q(*call), sd.unet(*call)) for call in calls]
                row = {"weight_bits": bits, "engine": name, "n": len(calls)}
                row["execution"] = getattr(unet, "execution", "")
                row["to_fp32_db"] = np.mean([decibels(out, full) for out, _, full in outputs])
                if unet is not q:
                    row["to_simulation_db"] = np.mean([decibels(out, want) for out, want, _ in outputs])
                rows.append(row)
                print(row, flush=True)
    if args.out is not None:
        pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
