"""Images of the tiny model at few bits: this package's recipes beside optimum-quanto, torchao and NNCF.

    python tests/benchmarks/low_bits.py --images 256 --out reports/benchmarks/low_bits.csv

The same weights, prompts and initial noise for all (20 DDIM steps); differences are to the unquantized UNet,
with 95 % intervals. `megabytes` is the size of our packed file. For a peer it is a lower bound: n bits for
each weight that it quantizes, 16 bits for all else, nothing for scales. A peer that is not installed, or
fails, has a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import sdcomp
from sdcomp.evaluation import Clip, clip_scores, layer_errors, load_prompts, paired_difference, psnr, thinned
from sdcomp.quantization import (
    PRESETS,
    Calibrator,
    QuantModel,
    build,
    choose_bits,
    quantize,
    weight_overrides,
)
from sdcomp.quantization.methods import LowRankBranch
from sdcomp.scenes import prompt_accuracy

COLUMNS = (
    "variant", "split", "n", "accuracy", "accuracy_difference", "low", "high", "clip_difference", "psnr",
    "megabytes",
)  # fmt: skip


def ours(sd: sdcomp.StableDiffusion, calibration: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the recipes, one for each budget."""

    def made(recipe: str, weight_bits: int, act_bits: int = 8, **changes: object) -> QuantModel:
        chosen = replace(PRESETS[recipe], **changes)
        return quantize(sd, chosen, calibration, weight_bits=weight_bits, act_bits=act_bits, seed=1)

    def published(recipe: str, weight_bits: int, act_bits: int) -> QuantModel:
        q = build(recipe, sd.unet, weight_bits, act_bits)
        return Calibrator(sd, q, **PRESETS[recipe].calibrator).calibrate(calibration, steps=20, seed=1)

    def linear_only() -> QuantModel:
        """The layers that torchao quantizes."""
        convolutions = [name for name, m in sd.unet.named_modules() if isinstance(m, nn.Conv2d)]
        weights = {**PRESETS["weights_gptq_groups"].weights, "group_size": 16}
        return made("weights_gptq_groups", 4, weights=weights, model={"quant_filters": convolutions})

    yield "sdcomp mse W8A8", lambda: published("mse", 8, 8)
    yield "sdcomp mse W4A8", lambda: published("mse", 4, 8)
    yield "sdcomp mse W4A4", lambda: published("mse", 4, 4)
    yield "sdcomp weights_gptq W4", lambda: made("weights_gptq", 4)
    yield "sdcomp weights_gptq_groups W3 g64", lambda: made("weights_gptq_groups", 3)
    yield "sdcomp mixed, 2.5 bits a weight", lambda: mixed(sd, calibration, 2.5)
    yield "sdcomp low_bits W8A8", lambda: made("low_bits", 8, 8)
    yield "sdcomp low_bits W4A8", lambda: made("low_bits", 4, 8)
    yield "sdcomp low_bits W4A4", lambda: made("low_bits", 4, 4)
    yield "sdcomp low_bits W4A4, all layers at 4 bits", lambda: made("low_bits", 4, 4, model={})
    yield "sdcomp low_bits W3A6", lambda: made("low_bits", 3, 6)
    for rank in (4, 16):
        few = {"methods": (LowRankBranch(rank),)}
        yield f"sdcomp low_rank {rank} W4A4", partial(made, "low_rank", 4, 4, **few)
        name = f"sdcomp low_rank {rank} W4A4, all layers at 4 bits"
        yield name, partial(made, "low_rank", 4, 4, **few, model={})
    yield "sdcomp weights_gptq W4 g16, linear layers", linear_only


def mixed(sd: sdcomp.StableDiffusion, calibration: list[str], average: float) -> QuantModel:
    """Weights of 2, 3, 4 or 8 bits in groups of 64, `average` bits a weight, scales and zero points included.

    The error of the noise is measured for each layer alone at each of these bits; then the bits are divided.
    """
    recipe = PRESETS["weights_gptq_groups"]
    recipe = replace(recipe, weights={**recipe.weights, "symmetric": False}, model={})
    probes = load_prompts(sd, "calibration", len(calibration) + 8).texts[-8:]
    trace = thinned(sd.generate(probes, steps=20, trace=True)[1], 8, 4)
    errors: dict[str, dict[int, float]] = {}
    for bits in (2, 3, 4, 8):
        model = quantize(sd, recipe, calibration, weight_bits=bits, seed=1)
        for name, error in layer_errors(sd, model, probes, trace).items():
            errors.setdefault(name, {})[bits] = error
    sizes = {layer.name: layer.weight.numel() for layer in model.quantized_layers()}
    # Each group of 64 has a scale of 16 bits and a zero point of 8.
    chosen = choose_bits(errors, sizes, average - 24 / 64)
    return quantize(sd, recipe, calibration, weight_bits=2, seed=1, overrides=weight_overrides(chosen))


def peers(
    sd: sdcomp.StableDiffusion, calibration: list[str]
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield what the peers offer for a plain PyTorch module on a CPU."""

    def quanto(weights: str, activations: str | None = None) -> nn.Module:
        from optimum import quanto

        unet = copy.deepcopy(sd.unet)
        chosen = None if activations is None else quanto.qtypes[activations]
        quanto.quantize(unet, weights=quanto.qtypes[weights], activations=chosen)
        if activations is not None:
            with quanto.Calibration():
                sd.replace(unet=unet).generate(calibration[:16], steps=20, seed=1)
        quanto.freeze(unet)
        return unet

    def torchao(config: str, **arguments: object) -> nn.Module:
        import torchao.quantization as ao

        unet = copy.deepcopy(sd.unet)
        ao.quantize_(unet, getattr(ao, config)(**arguments))
        return unet

    def torchao_groups(bits: str) -> nn.Module:
        from torchao.quantization.granularity import PerGroup

        return torchao("IntxWeightOnlyConfig", weight_dtype=getattr(torch, bits), granularity=PerGroup(16))

    def nncf_activations(weight_bits: int, act_bits: int) -> nn.Module:
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            QuantizationParameters,
        )

        calls: list[tuple] = []
        with observed(sd.unet, calls):
            sd.generate(calibration[:16], steps=20, seed=1)
        how = AdvancedQuantizationParameters(
            weights_quantization_params=QuantizationParameters(num_bits=weight_bits),
            activations_quantization_params=QuantizationParameters(num_bits=act_bits),
        )
        return nncf.quantize(
            copy.deepcopy(sd.unet),
            nncf.Dataset(calls),
            subset_size=len(calls),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=how,
        )

    def nncf(**arguments: object) -> nn.Module:
        import nncf

        latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 24, sd.config.unet.context_dim)
        example = (latents, torch.tensor([500, 500]), context)
        mode = nncf.CompressWeightsMode.INT4_SYM
        data = nncf.Dataset([example])
        return nncf.compress_weights(copy.deepcopy(sd.unet), mode=mode, dataset=data, **arguments)

    yield "optimum-quanto W8A8", lambda: quanto("qint8", "qint8")
    yield "optimum-quanto W4A8", lambda: quanto("qint4", "qint8")
    yield "optimum-quanto W4", lambda: quanto("qint4")
    yield "optimum-quanto W2", lambda: quanto("qint2")
    yield "torchao W8A8 dynamic, linear layers", lambda: torchao("Int8DynamicActivationInt8WeightConfig")
    yield "torchao W4 g16, linear layers", lambda: torchao_groups("int4")
    yield "torchao W3 g16, linear layers", lambda: torchao_groups("int3")
    yield "NNCF W4 g16, convolutions at 8 bits", lambda: nncf(group_size=16)
    yield "NNCF W8A8", lambda: nncf_activations(8, 8)
    yield "NNCF W4A8", lambda: nncf_activations(4, 8)
    yield "NNCF W4A4", lambda: nncf_activations(4, 4)


@contextmanager
def observed(unet: nn.Module, calls: list[tuple]) -> Iterator[None]:
    """Keep the arguments of the UNet's calls in `calls`."""
    hook = unet.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    try:
        yield
    finally:
        hook.remove()


def least_megabytes(unet: nn.Module, name: str) -> float:
    """Return the fewest megabytes that a peer's weights can take, by the bits and layers in its name."""
    bits = int(re.search(r"W(\d)", name)[1])
    convolution = 8 if "convolutions at 8 bits" in name else 16 if "linear layers" in name else bits
    weights = [(bits, nn.Linear), (convolution, nn.Conv2d)]
    sizes = [(n, sum(m.weight.numel() for m in unet.modules() if isinstance(m, kind))) for n, kind in weights]
    others = sum(p.numel() for p in unet.parameters()) - sum(size for _, size in sizes)
    return round((sum(n * size for n, size in sizes) + 16 * others) / 8e6, 2)


def megabytes(sd: sdcomp.StableDiffusion, unet: QuantModel) -> float:
    """Return the size of a packed file of the UNet."""
    with tempfile.TemporaryDirectory() as folder:
        saved = sdcomp.save(sd.replace(unet=unet), Path(folder) / "model", format="packed")
        return round((saved / "packed.safetensors").stat().st_size / 1e6, 2)


def main() -> None:
    """Measure every variant and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="data/tiny")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--splits", nargs="+", default=["test"])
    parser.add_argument("--only", default="", help="a regular expression of the variants to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sd = sdcomp.load(args.model)
    clip = Clip.of(sd)
    calibration = load_prompts(sd, "calibration", args.calibration).texts
    sets = {split: load_prompts(sd, split, args.images) for split in args.splits}
    baselines = {split: sd.generate(prompts.texts) for split, prompts in sets.items()}
    rows = []
    for name, make in [*ours(sd, calibration), *peers(sd, calibration)]:
        if not re.search(args.only, name):
            continue
        try:
            unet = make()
            for split, prompts in sets.items():
                images = sd.replace(unet=unet).generate(prompts.texts)
                rows.append(
                    {"variant": name, "split": split, **judge(sd, clip, images, baselines[split], prompts)}
                )
                peer = not isinstance(unet, QuantModel)
                rows[-1]["megabytes"] = least_megabytes(sd.unet, name) if peer else megabytes(sd, unet)
        except Exception as error:
            # A peer may fail in any way; the others are measured all the same.
            if name.startswith("sdcomp"):
                raise
            rows.append({"variant": f"{name}: {type(error).__name__}"})
        print(rows[-1], flush=True)
        if args.out:
            with args.out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def judge(sd, clip, images, baseline, prompts) -> dict[str, object]:
    """Score images beside the baseline's."""
    right, before = (
        prompt_accuracy(sd.reader, some, prompts.scenes).all_right for some in (images, baseline)
    )
    change = paired_difference(right, before, prompts.groups)
    texts = prompts.texts
    cosine = (clip_scores(clip, images, texts) - clip_scores(clip, baseline, texts)).mean().item()
    return {
        "n": len(images),
        "accuracy": round(100 * right.double().mean().item(), 1),
        "accuracy_difference": round(change.value, 1),
        "low": round(change.low, 1),
        "high": round(change.high, 1),
        "clip_difference": round(cosine, 2),
        "psnr": round(psnr(images, baseline, prompts.groups).value, 1),
    }


if __name__ == "__main__":
    main()
