"""Images of exported UNets beside the simulation that they were made of.

    python tests/benchmarks/deploy_images.py --images 256 --out reports/benchmarks/deploy_images.csv

The tiny model, 8 bits, in timestep intervals; the same prompts and initial noise for all (20 DDIM steps).
Differences and PSNR are to the simulation, image by image, with 95 % intervals. Our int8 kernels stand beside
the exports. "int8 scores" rounds attention's queries and keys too. Such an export is compared with the
simulation that does so, and this simulation with the one that does not.

The table is written after each engine, and a run that was killed goes on from it. Needs the `deploy` extra.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from low_bits import judge
from torch import Tensor, nn

import sdcomp
from sdcomp.evaluation import Clip, load_prompts
from sdcomp.evaluation.cache import cached_images
from sdcomp.integer import to_int8
from sdcomp.quantization import PRESETS, QuantModel, quantize


class ONNXUNet(nn.Module):
    """A UNet that ONNX Runtime runs on the CPU."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(file, options)

    def forward(self, latents: Tensor, timestep: int, context: Tensor) -> Tensor:
        inputs = (latents, torch.tensor([float(timestep)]), context)
        names = [i.name for i in self.session.get_inputs()]
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(self.session.run(None, feed)[0])


def openvino(
    sd: sdcomp.StableDiffusion, q: QuantModel, folder: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    file = sdcomp.export(sd.replace(unet=q), Path(folder, "unet.xml"), format="openvino")
    return sdcomp.export.load_openvino(file, dtype)


def onnx(sd: sdcomp.StableDiffusion, q: QuantModel, folder: str) -> nn.Module:
    return ONNXUNet(sdcomp.export(sd.replace(unet=q), Path(folder, "unet.onnx"), format="onnx"))


SCORES = ", int8 scores"
SIMULATED = "simulated" + SCORES
ENGINES: dict[str, Callable[..., nn.Module]] = {
    "openvino": openvino,
    "openvino, bfloat16 between": partial(openvino, dtype=torch.bfloat16),
    SIMULATED: lambda sd, q, folder: q,
    "openvino" + SCORES: openvino,
    "openvino, bfloat16 between" + SCORES: partial(openvino, dtype=torch.bfloat16),
    "sdcomp int8": lambda sd, q, folder: to_int8(q),
    "sdcomp int8, bfloat16 between": lambda sd, q, folder: to_int8(q, torch.bfloat16),
    "onnxruntime": onnx,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--recipe", default="timestep_mse")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = sdcomp.load("data/tiny")
    clip, prompts = Clip.of(sd), load_prompts(sd, "test", args.images)
    calibration = load_prompts(sd, "calibration", args.calibration).texts
    recipe = PRESETS[args.recipe]
    scores = replace(recipe, model={**recipe.model, "quantize_attention_products": "scores"})
    models = [quantize(sd, chosen, calibration, seed=1) for chosen in (recipe, scores)]
    simulated = [cached_images(sd.replace(unet=q), prompts.texts) for q in models]
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    for name in args.engines:
        if (name, args.recipe) in {(row["engine"], row["recipe"]) for row in rows}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            unet = ENGINES[name](sd, models[SCORES in name], folder)
            images = sd.replace(unet=unet).generate(prompts.texts)
        reference = simulated[SCORES in name and name != SIMULATED]
        row = judge(sd, clip, images, reference, prompts)
        rows.append({"engine": name, "recipe": args.recipe, **row})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
