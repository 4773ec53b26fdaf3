"""Cost of simulated quantization: a fake-quantized forward and a calibration, beside the plain model's.

    python tests/benchmarks/quantization.py --out base.csv                # the base model
    python tests/benchmarks/quantization.py --model sd15 --out sd15.csv   # SD 1.5's UNet, random weights

A forward is one guided step. All variants are called in turn, so that drift cancels; the table has medians
and the median of the ratios to the plain forward of the same round, with bootstrap 95 % intervals. Beside
them torchao's and optimum-quanto's paths in the same rounds, where the `peers` extra is installed; they
quantize less or otherwise, as the column says.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

import sdcomp
from sdcomp.evaluation.timing import interleaved_times, median
from sdcomp.files import ROOT
from sdcomp.model import SD15, StableDiffusion, UNet, VAEDecoder, VAEEncoder
from sdcomp.model.clip import build_text_encoder
from sdcomp.model.tokenizer import load_tokenizer
from sdcomp.quantization import Calibrator, QuantModel, TimeStepCalibratedQuantModel

PROMPTS = ["a small red star on a navy background", "a large blue circle left of a small green square"]


def stable_diffusion_15() -> StableDiffusion:
    """SD 1.5's architecture with random weights."""
    torch.manual_seed(0)
    parts = {
        "unet": UNet(SD15.unet),
        "encoder": VAEEncoder(SD15.vae),
        "decoder": VAEDecoder(SD15.vae),
        "text_encoder": build_text_encoder(SD15),
    }
    for part in parts.values():
        part.eval().requires_grad_(False)
    return StableDiffusion(SD15, tokenizer=load_tokenizer(ROOT / "data" / "clip_tokenizer", SD15), **parts)


def example(sd: StableDiffusion, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The UNet's input for `batch` images with guidance."""
    config, rows = sd.config, 2 * batch
    side = config.image_size // config.vae.downsampling
    length = config.text["max_position_embeddings"]
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 4, side, side, generator=generator),
        torch.full((rows,), 500),
        torch.randn(rows, length, config.unet.context_dim, generator=generator),
    )


def observed(model: QuantModel, args: tuple) -> QuantModel:
    """A model with the ranges of one call: timings do not depend on what they are."""
    for layer in model.quantized_layers():
        layer.set_act_scales(torch.full_like(layer.act_scale, 0.05), torch.zeros_like(layer.act_scale))
    model.is_calibrated.fill_(True)
    model(*args)
    return model


def torchao_fake(unet: nn.Module, args: tuple) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    acts = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(unet, QATConfig(activation_config=acts, weight_config=weights, step="prepare"))
    return unet


def torchao_int8(unet: nn.Module, args: tuple) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return unet


def quanto_int8(unet: nn.Module, args: tuple) -> nn.Module:
    from optimum.quanto import Calibration, freeze, qint8, quantize

    unet.to(memory_format=torch.contiguous_format)  # its fallback for norms takes no channels-last maps
    quantize(unet, weights=qint8, activations=qint8)
    with Calibration():
        unet(*args)
    freeze(unet)
    return unet


PEERS: dict[str, tuple[str, str, Callable[[nn.Module, tuple], nn.Module]]] = {
    "torchao fake-quantize": ("torchao", "linears, dynamic ranges", torchao_fake),
    "torchao int8": ("torchao", "linears, dynamic ranges, integer products", torchao_int8),
    "optimum-quanto int8": ("optimum.quanto", "linears, convolutions and norms' outputs", quanto_int8),
}


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@torch.inference_mode()
def forwards(sd: StableDiffusion, batch: int, repeats: int) -> list[dict[str, object]]:
    """Seconds of one guided step; each peer in turn with the plain model, then freed."""
    args = example(sd, batch)
    off = QuantModel(sd.unet).set_use_quant(False, False)
    own = {
        "plain": ("", sd.unet),
        "sdcomp, switched off": ("nothing", off),
        "sdcomp QuantModel": ("convolutions and linears", observed(QuantModel(sd.unet), args)),
        "sdcomp timestep-aware, split": (
            "convolutions and linears, halves of skips apart",
            observed(TimeStepCalibratedQuantModel(sd.unet, k=10, split_shortcuts=True), args),
        ),
    }
    table = measured(own, args, repeats)
    own.clear()
    for name, (package, text, build) in PEERS.items():
        if not installed(package):
            print(f"{name} is left out: {package} is not installed (pip install .[peers])")
            continue
        try:
            with torch.inference_mode(False), torch.no_grad():
                peer = build(copy.deepcopy(sd.unet), tuple(a.clone() for a in args))
            table += measured({"plain": ("", sd.unet), name: (text, peer)}, args, repeats)[1:]
            del peer
        except Exception as error:
            print(f"{name} fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return table


def measured(models: dict[str, tuple[str, nn.Module]], args: tuple, repeats: int) -> list[dict[str, object]]:
    """Models called in turn; the first, "plain", is what the others are relative to."""
    calls = {name: lambda m=model: m(*args) for name, (_, model) in models.items()}
    what = {name: text for name, (text, _) in models.items()}
    return rows("forward", interleaved_times(calls, repeats, warmup=1), "plain", what)


def calibrations(sd: StableDiffusion, batch: int, steps: int, repeats: int) -> list[dict[str, object]]:
    """Seconds of generating `batch` images, plain and with their ranges observed."""
    prompts = (PROMPTS * batch)[:batch]
    settings = {"steps": steps, "batch_size": batch, "sampler": "ddpm"}

    def calibrate(policy: str, **kwargs: object) -> None:
        q = TimeStepCalibratedQuantModel(sd.unet, timesteps=steps, k=min(5, steps), **kwargs)
        Calibrator(sd, q, act_scale_policy=policy).calibrate(prompts, **settings)

    calls = {
        "generate": lambda: sd.generate(prompts, **settings),
        "calibrate max": lambda: calibrate("max"),
        "calibrate mse": lambda: calibrate("mse"),
        "calibrate mse, optimal boundaries": lambda: calibrate("mse", boundaries="optimal"),
    }
    return rows("calibration", interleaved_times(calls, repeats, warmup=1), "generate", {})


def rows(kind: str, times: dict, baseline: str, what: dict[str, str]) -> list[dict[str, object]]:
    table = []
    for name, values in times.items():
        ratio = median(values, times[baseline])
        table.append(
            {
                "kind": kind, "method": name, "quantizes": what.get(name, ""),
                "seconds": median(values).value, "fastest": values.min(), "slowest": values.max(),
                "ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high,
                "repeats": values.size,
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="data/tiny", help="a model, or sd15 for its architecture")
    parser.add_argument("--batch", type=int, help="images at a time; 16, and 1 for sd15")
    parser.add_argument("--steps", type=int, help="of a calibration; 20, and 2 for sd15")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    large = options.model == "sd15"
    sd = stable_diffusion_15() if large else sdcomp.load(options.model)
    batch = options.batch or (1 if large else 16)
    table = pd.DataFrame(
        forwards(sd, batch, options.repeats)
        + calibrations(sd, batch, options.steps or (2 if large else 20), options.repeats)
    )
    table = table.assign(
        model=options.model, batch=batch, threads=torch.get_num_threads(), torch=torch.__version__
    )
    print(table.to_string(index=False, float_format="%.3f"))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
