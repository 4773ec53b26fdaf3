"""Compressed models as folders that `sdcomp.load` opens and `generate` runs, with nothing else at hand.

Such a folder is a model folder with a quantized UNet. Either the scales stand beside its weights
(`quantization.json`), or its integers stand in their place: bytes (`int8.json`), or n bits each
(`packed.json`). `compression.json` says where the model comes from and how it is quantized. What pruning
removed is in `unet_channels.json`, as in any model folder, or in the file of the integers.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdcomp import model
from sdcomp.errors import UserError
from sdcomp.files import resolve_input, write_text
from sdcomp.integer import (
    Int8Model,
    PackedModel,
    int8_files,
    load_int8,
    load_packed,
    packed_files,
    save_int8,
    save_packed,
    to_packed,
)
from sdcomp.model import ModelError, StableDiffusion, UNet, weights_digest
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.model.files.replacement import replacing_model
from sdcomp.model.files.tensors import read_json
from sdcomp.model.kinds import require_model
from sdcomp.quantization import QuantModel, load_quant_model, quantization_files, save_quant_model
from sdcomp.quantization.layers import is_quantizable

RECORD = "compression.json"
_Integers = Int8Model | PackedModel
"""UNets that have files of their own, without plain weights beside them."""
_WRITERS = (Int8Model, save_int8), (PackedModel, save_packed), (QuantModel, save_quant_model)
_INTEGERS = int8_files.FILES.config, packed_files.FILES.config
_FILES = {
    "Int8Model": (int8_files.FILES.config, int8_files.FILES.tensors),
    "PackedModel": (packed_files.FILES.config, packed_files.FILES.tensors),
    **dict.fromkeys(
        ("QuantModel", "TimeStepCalibratedQuantModel"), (quantization_files.CONFIG, quantization_files.SCALES)
    ),
}
"""The files of each kind of UNet that `RECORD` may name."""


def save(
    sd: StableDiffusion,
    path: str | Path,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    record: dict[str, Any] | None = None,
) -> Path:
    """Write a model, whose UNet may be plain, pruned, quantized, packed or int8; returns the path.

    `format` is "sdcomp", "original" or "diffusers", see `sdcomp.model.save`, or "packed". "sdcomp" holds
    every UNet, and a quantized one keeps its type. "packed" is for a quantized or packed UNet: it writes the
    weights with n bits each, and leaves out the zeros of a pruned one. "original" and "diffusers" hold plain
    UNets only. `dtype` is the type of the plain weights. `record` says more about the model, ready for JSON:
    its origin, the evaluation that it passed.

    Raises UserError for a path that cannot be written, ModelError for a UNet that the format cannot hold,
    TypeError for a `dtype` that `load` does not take and for a UNet alone, and for "packed" what
    `sdcomp.to_packed` raises.
    """
    require_model(sd)
    path, unet = Path(path).expanduser(), sd.unet
    if format == "packed":
        if not isinstance(unet, QuantModel | PackedModel):
            raise ModelError("the packed format holds quantized UNets: quantize the UNet first")
        unet = to_packed(unet) if isinstance(unet, QuantModel) else unet
        format = "sdcomp"
    quantized = isinstance(unet, _Integers | QuantModel)
    if format is None:
        format = "original" if path.suffix == ".safetensors" else "sdcomp"
    if (quantized or record is not None) and format != "sdcomp":
        raise ModelError(f"the {format} format holds plain models without a record: save a folder of ours")
    if isinstance(unet, _Integers):
        sd = sd.replace(unet=None)
    elif quantized:
        sd = sd.replace(unet=_plain(unet))
    if not quantized and record is None:
        return model.save(sd, path, dtype, format)
    about = {
        "unet": type(unet).__name__,
        "weights": weights_digest(unet),
        "quantization": _quantization(unet),
        "sdcomp": importlib.metadata.version("sdcomp"),
        "torch": torch.__version__,
        "record": record or {},
    }
    text = json.dumps(about, indent=2) + "\n"
    with replacing_model(path):
        model.save(sd, path, dtype, "sdcomp")
        write_text(path / RECORD, text)
        for kind, write in _WRITERS:
            if isinstance(unet, kind):
                write(unet, path)
    return path


def load(path: str | Path, *, execution: str = "auto", **options: Any) -> StableDiffusion:
    """Load any model. `options` are the other arguments of `sdcomp.model.load`.

    A folder that `sdcomp.save` wrote gives the quantized, packed or int8 UNet that it was written with. An
    int8 UNet keeps the type that it was saved in, and `dtype` is for the other parts; `device` and
    `execution` choose how it runs, see `sdcomp.integer.execution.choose_execution`. The weights of a packed
    UNet are mapped from the file. It computes in `dtype`, or in the type that it was saved in if that is
    None.

    Raises what `sdcomp.model.load` raises, and UserError for an `execution` that the device does not have,
    or that is given for a model without int8 weights.
    """
    folder, unet = resolve_input(path), options.pop("unet", None)
    _require_unet(folder)
    if options.get("loras") and _has(folder, *_INTEGERS, quantization_files.CONFIG):
        raise ModelError(f"{path} is quantized: merge LoRA files into the model that it was made of")
    if unet is not None and _has(folder, *_INTEGERS):
        raise ModelError(f"{path} has its own UNet in integers: leave unet out, or use sdcomp.model.load")
    # Where one of the two is missing, loading says so.
    if _has(folder, *_FILES["Int8Model"]):
        # The other parts first: they check the device.
        sd = model.load(path, unet=nn.Identity(), **options)
        sd = sd.replace(unet=load_int8(folder, device=sd.device, execution=execution))
        _check(sd, folder / int8_files.FILES.config)
        return sd
    if execution != "auto":
        raise UserError(f"{path} holds no int8 model: leave execution={execution!r} out")
    if _has(folder, *_FILES["PackedModel"]):
        sd = model.load(path, unet=nn.Identity(), **options)
        dtype = options.get("dtype", torch.float32)
        sd = sd.replace(unet=load_packed(folder, device=sd.device, dtype=dtype))
        _check(sd, folder / packed_files.FILES.config)
        return sd
    sd = model.load(path, unet=unet, **options)
    if _has(folder, *_FILES["QuantModel"]):
        sd = sd.replace(unet=load_quant_model(folder, sd.unet))
        _check(sd, folder / quantization_files.CONFIG)
    return sd


def _has(folder: Path, *names: str) -> bool:
    return any(os.path.lexists(folder / name) for name in names)


def _require_unet(folder: Path) -> None:
    """Raise ModelError where the record names a quantized UNet, of which there is no file."""
    if not _has(folder, RECORD):
        return
    kind = read_json(folder / RECORD, lambda about: str(about.get("unet")), "is damaged")
    files = _FILES.get(kind, ())
    if files and not _has(folder, *files):
        raise ModelError(
            f"{folder} has no {files[0]}, but its UNet is a {kind}: the save or the copy was not finished; "
            "save or copy it again"
        )


def _check(sd: StableDiffusion, file: Path) -> None:
    """Raise ModelError where the file's UNet is not one for this model."""
    unet, steps = sd.unet, sd.config.schedule.train_timesteps
    if unet.config != sd.config.unet:
        raise ModelError(f"{file} is of another UNet than config.json; copy both from the same model")
    if getattr(unet, "timestep_arg", None) is None:
        return
    if unet.timestep_arg not in (1, "timesteps"):
        raise ModelError(f"{file}: timestep_arg is {unet.timestep_arg!r}, but must be 1 or 'timesteps'")
    if unet.train_timesteps < steps:
        raise ModelError(
            f"{file}: train_timesteps is {unet.train_timesteps}, but config.json has {steps} timesteps"
        )


def _quantization(unet: nn.Module) -> dict[str, Any] | None:
    """How a UNet is quantized, for those who read the record; None where it is not."""
    if not isinstance(unet, _Integers | QuantModel):
        return None
    if isinstance(unet, Int8Model):
        bits = [unet.settings["weight_bits"], unet.settings["act_bits"]]
    else:
        bits = [q and q.n_bits for q in (unet.weight_quantizer, unet.act_quantizer)]
    left_out = [name for name, layer in unet.module.named_modules() if is_quantizable(layer)]
    return {
        "weight_bits": bits[0],
        "act_bits": bits[1],
        "intervals": unet.intervals,
        "left_out": sorted(left_out),
    }


def _plain(quantized: QuantModel) -> UNet:
    """The full-precision UNet inside a quantized one; weights are shared."""
    inside = quantized.module
    if not isinstance(inside, UNet):
        raise ModelError(f"only our UNet can be saved as a model, not a quantized {type(inside).__name__}")
    with torch.device("meta"):
        unet = apply_channel_map(UNet(inside.config), channel_map(inside))
    state = inside.state_dict()
    unet.load_state_dict({name: state[name] for name in unet.state_dict()}, assign=True)
    return unet
