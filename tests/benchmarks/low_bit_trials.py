"""Published methods for low bits that this package does not offer, each tried on top of its own recipe.

    python tests/benchmarks/low_bit_trials.py --images 96 --out reports/benchmarks/low_bit_trials.csv

The tiny model at W4A4 by the recipe `low_bits`, with one change at a time; all else is equal: prompts, noise,
bits, which layers keep 8. Differences are to the unquantized UNet, with 95 % intervals. `step_error` is the
mean squared error of the guided noise along the unquantized path. A method that gains nothing here is not
offered as an option.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from low_bits import judge
from torch import Tensor, nn

import sdcomp
from sdcomp.evaluation import Clip, load_prompts, noise_mse
from sdcomp.moments import weight_matrix
from sdcomp.quantization import PRESETS, QuantModel, apply_recipe, build, quantize
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.methods import SecondOrderRounding

BITS = 4
# Ranges of merged calls: they take a third of the time, and with the ends at 8 bits are as good.
MERGED = {"act_scale_policy": "mse", "act_update_policy": "merged"}
RECIPE = replace(PRESETS["low_bits"], calibrator=MERGED)


def product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Compute a layer's output without its bias, with another weight."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding)
    return F.linear(x, weight)


def observe(
    unet: nn.Module, run: Callable[[nn.Module], object], see: Callable[[str, nn.Module, Tensor], None]
):
    """Run a UNet, and show the input of each convolution and linear layer."""
    kinds = nn.Conv2d | nn.Linear
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args[0]))
        for name, layer in unet.named_modules()
        if isinstance(layer, kinds)
    ]
    run(unet)
    for handle in handles:
        handle.remove()


def largest_inputs(unet: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of each layer."""
    largest: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        dims = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(x.dim() - 1))
        values = x.abs().amax(dims)
        largest[name] = torch.maximum(largest.get(name, values), values)

    observe(unet, run, see)
    return largest


def balanced(unet: nn.Module, run: Callable[[nn.Module], object], alpha: float, linear: bool) -> nn.Module:
    """SmoothQuant (Xiao et al. 2023, equation 4): divide input channels by s, multiply the weight by s.

    The division runs as a hook here, which folding it into the layer before would save.
    """
    largest = largest_inputs(unet, run)
    unet = copy.deepcopy(unet)
    for name, layer in unet.named_modules():
        if name not in largest or (linear and not isinstance(layer, nn.Linear)):
            continue
        weight = layer.weight.detach()
        own = weight.abs().amax([d for d in range(weight.dim()) if d != 1])
        s = (largest[name].clamp(min=1e-5) ** alpha / own.clamp(min=1e-5) ** (1 - alpha)).clamp(1e-3, 1e3)
        layer.weight = nn.Parameter(weight * s.view(-1, *[1] * (weight.dim() - 2)), requires_grad=False)
        s = s.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else s
        layer.register_forward_pre_hook(lambda _, args, s=s: (args[0] / s, *args[1:]))
    return unet


@torch.no_grad()
def correct_biases(model: QuantModel, run: Callable[[nn.Module], object]) -> QuantModel:
    """Bias correction (Nagel et al. 2019, section 4.2): add the mean error of each output channel."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def see(name: str, layer: nn.Module, x: Tensor) -> None:
        rounded = model.state.quantize(x, layer.input_grids(), layer.split)
        error = product(layer, x, layer.weight) - product(layer, rounded, layer.fake_weight())
        dims = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(error.dim() - 1))
        before, count = sums.get(name, (0.0, 0))
        sums[name] = before + error.mean(dims), count + 1

    model.set_use_quant(False, False)
    observe(model.module, lambda _: run(model), see)
    model.set_use_quant(True, True)
    for name, layer in model.module.named_modules():
        if name in sums:
            total, count = sums[name]
            bias = torch.zeros_like(total) if layer.bias is None else layer.bias.detach()
            layer.bias = nn.Parameter(bias + total / count, requires_grad=False)
    return model


class Halves(nn.Module):
    """Scales of their own for the rows without and with the prompt, as two models that share weights."""

    def __init__(self, unconditional: nn.Module, conditional: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList([unconditional, conditional])

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        rows = zip(latents.chunk(2), context.chunk(2), self.models, strict=True)
        return torch.cat([model(x, timestep, c) for x, c, model in rows])


class OneHalf(nn.Module):
    """Gives a model to be calibrated one half of the rows; the unquantized UNet predicts."""

    def __init__(self, unet: nn.Module, model: nn.Module, half: int) -> None:
        super().__init__()
        self.unet, self.model, self.half = unet, model, half

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        self.model(latents.chunk(2)[self.half], timestep, context.chunk(2)[self.half])
        return self.unet(latents, timestep, context)


@dataclass(frozen=True)
class LearnedRounding(SecondOrderRounding):
    """AdaRound (Nagel et al. 2020, equations 21 to 24) on the same second moments: floor, or one above.

    The loss of a layer, relative to the energy of its output, is minimized by Adam over rectified sigmoids.
    Layers of more than `columns` columns, where this takes minutes, are rounded by second order.
    """

    steps: int = 1000
    columns: int = 500

    def __call__(self, layer: QuantLayer, moments: Tensor) -> None:
        weight = weight_matrix(layer).float()
        if weight.shape[1] > self.columns:
            super().__call__(layer, moments)
            return
        grids = zip(layer.halves(layer.weight.detach()), layer.weight_grids(), strict=True)
        parts = [layer.weight_quantizer.broadcast_grid(part, grid) for part, grid in grids]
        scale = torch.cat(
            [s.expand_as(p) for p, (s, _, _) in zip(layer.halves(layer.weight), parts, strict=True)], 1
        ).flatten(1)
        low, high = layer.weight_quantizer.bounds(None)
        floor = (weight / scale).floor()
        with torch.inference_mode(False), torch.enable_grad():
            rest = (weight / scale - floor + 0.1).clamp(1e-3, 1.2 - 1e-3) / 1.2
            v = torch.log(rest / (1 - rest)).requires_grad_()
            optimizer = torch.optim.Adam([v], lr=1e-2)
            energy = ((weight @ moments) * weight).sum()
            for step in range(self.steps):
                up = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
                change = (floor + up).clamp(low, high) * scale - weight
                loss = ((change @ moments) * change).sum() / energy
                warm = step / self.steps - 0.2
                if warm > 0:
                    beta = 20 - 18 * warm / 0.8
                    loss = loss + 0.01 * (1 - (2 * up - 1).abs().pow(beta)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        rounded = (floor + (v.detach() > 0)).clamp(low, high) * scale
        layer.set_rounded(rounded)


def trials(
    sd: sdcomp.StableDiffusion, prompts: Sequence[str]
) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Yield the method, its argument and what builds the model."""

    def run(unet: nn.Module) -> None:
        sd.replace(unet=unet).generate(prompts, steps=20, seed=1, batch_size=16)

    def low_bits(unet: nn.Module = sd.unet, **changes: object) -> QuantModel:
        recipe = replace(RECIPE, **changes)
        return quantize(
            sd.replace(unet=unet), recipe, prompts, weight_bits=BITS, act_bits=BITS, seed=1, batch_size=16
        )

    def halves() -> Halves:
        models = []
        for half in (0, 1):
            model = build(RECIPE, sd.unet, BITS, BITS)
            apply_recipe(model, RECIPE, lambda model=model, half=half: run(OneHalf(sd.unet, model, half)))
            models.append(model)
        return Halves(*models)

    rounded = cache(low_bits)

    def intervals(k: int, seed: int) -> QuantModel:
        """Ranges of their own in k intervals; all share the rounding of `low_bits`."""
        recipe = replace(PRESETS["timestep_low_bits"], calibrator=MERGED, methods=())
        arguments = {"weight_bits": BITS, "act_bits": BITS, "k": k, "timesteps": 20, "batch_size": 16}
        model = quantize(sd, recipe, prompts, seed=seed, **arguments)
        for layer, other in zip(model.quantized_layers(), rounded().quantized_layers(), strict=True):
            layer.register_buffer("weight_integers", other.weight_integers)
            layer.clear_cache()
        return model

    yield "low_bits", "as it is", low_bits
    yield "rounding", "to nearest", lambda: low_bits(methods=())
    yield "rounding", "GPTQ alone", lambda: low_bits(methods=(SecondOrderRounding(passes=0),))
    yield "rounding", "learned (AdaRound), up to 500 columns", lambda: low_bits(methods=(LearnedRounding(),))
    yield "bias correction", "", lambda: correct_biases(low_bits(), run)
    for alpha in (0.25, 0.5):
        for linear in (True, False):
            where = "linear layers" if linear else "all layers"
            yield (
                "balancing",
                f"alpha {alpha}, {where}",
                partial(lambda *how: low_bits(balanced(sd.unet, run, *how)), alpha, linear),
            )
    yield "scales of each half", "", halves
    for k in (1, 2, 5, 10, 20):
        for seed in (1, 2, 3):
            yield "timestep intervals", f"k = {k}, calibration seed {seed}", partial(intervals, k, seed)
    yield "inputs", "symmetric", lambda: low_bits(inputs={})
    yield (
        "inputs",
        "a scale for each token",
        lambda: low_bits(inputs={"granularity": "token", "symmetric": False}),
    )


def main() -> None:
    """Measure every trial and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="data/tiny")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--only", default="", help="a part of the methods to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = sdcomp.load(args.model)
    clip = Clip.of(sd)
    prompts = load_prompts(sd, "test", args.images)
    held_out = load_prompts(sd, "calibration", 208).texts[192:]
    baseline = sd.generate(prompts.texts, steps=20)
    _, trace = sd.generate(held_out, steps=20, trace=True)
    rows = []
    for method, argument, make in trials(sd, load_prompts(sd, "calibration", args.calibration).texts):
        if args.only not in method:
            continue
        unet = make()
        images = sd.replace(unet=unet).generate(prompts.texts, steps=20)
        row = {"method": method, "argument": argument, **judge(sd, clip, images, baseline, prompts)}
        row["step_error"] = round(noise_mse(sd, unet, held_out, trace).mean().item(), 4)
        rows.append(row)
        print(row, flush=True)
        if args.out:
            with args.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
