"""Merge LoRA files into a model's weights.

LoRA (Hu et al. 2022, section 4.1) adds a product of two thin matrices to a weight: W + alpha / r * up @ down,
where `down` is `(r, columns)` and `up` is `(out, r)`. LoCon does the same for convolutions; with a matrix in
the middle, `down` and `up` are 1x1 convolutions around an r x r convolution with the layer's kernel.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sdcomp.files import resolve_input
from sdcomp.model.files.names import unet_name
from sdcomp.model.files.tensors import ModelError, finite, one_line, read_json, read_safetensors
from sdcomp.model.unet import UNet
from sdcomp.settings import shown

# Kohya's names end in .lora_down.weight, peft's in .lora_A.weight, those of old diffusers in
# _lora.down.weight or .lora_linear_layer.down.weight.
_KEY = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<matrix>down|up|mid|A|B)(?:\.default)?\.weight"
    r"|\.(?P<alpha>alpha))"
)
_MATRICES = {"A": "down", "B": "up"}
_OTHERS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa": r"hada_",
    "LoKr": r"lokr_",
    "OFT": r"oft_",
    "LoRA biases": r"lora_B.*\.bias",
}
_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."
"""What peft puts before the names of its own files; `adapter_config.json` beside them has the settings."""
_ODD = ("use_dora", "alpha_pattern", "fan_in_fan_out", "layer_replication", "megatron_config", "use_qalora")
"""Settings of peft that change the formula."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of peft's `init_lora_weights` that leave the weights of the model as they are."""


def merge_loras(loras: Mapping[str | Path, float], unet: UNet, text_encoder: nn.Module) -> None:
    """Add LoRA files to the weights of a UNet and a text encoder, in place, each times its scale.

    `loras` maps `.safetensors` files, or folders that peft saved, to scales. Names are those of kohya's
    scripts, peft or diffusers.
    Affected weights are replaced by new tensors of their type. Raises TypeError for loras that are no such
    mapping, ModelError for a file that is damaged, of another kind or of another model.
    """
    if not isinstance(loras, Mapping):
        raise TypeError(f"loras must map files to scales, as {{'style.safetensors': 0.8}}, not {loras!r}")
    layers = dict(_layers(unet, text_encoder))
    for path, scale in loras.items():
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise TypeError(f"the scale of {path} must be a number, not {scale!r}")
        file = resolve_input(path)
        if file.is_dir():
            file = file / "adapter_model.safetensors"
        for name, lora in read_lora(file).items():
            if name not in layers:
                raise ModelError(
                    f"{file} is a LoRA of another model: it changes {one_line(name)[:100]}, which this model"
                    " does not have"
                )
            _merge(file, name, layers[name], lora, scale)


def read_lora(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read a LoRA file: for each layer, by its name in the file, the matrices `down`, `up` and maybe `mid`.

    `alpha` is there too where the file, or the settings of peft beside it, give it. Raises ModelError for
    damaged files and other kinds.
    """
    tensors = read_safetensors(file, ModelError)
    loras: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if not found:
            raise ModelError(f"{file} {_why_not(key)}")
        kind = "alpha" if found["alpha"] else _MATRICES.get(found["matrix"], found["matrix"])
        if not tensor.is_floating_point() and kind != "alpha":
            raise ModelError(f"{file} holds {one_line(key)[:100]} in another type than floating point")
        loras[found["layer"].removeprefix(_PEFT)][kind] = tensor
    if not loras:
        raise ModelError(f"{file} is empty: it holds no LoRA")
    alphas = _adapter_alphas(file)
    scaling = None
    if any(key.startswith(_PEFT) for key in tensors):
        scaling = read_json(file.with_name("adapter_config.json"), _peft_scaling, "cannot be used")
    for name, lora in loras.items():
        for kind in ("down", "up"):
            if kind not in lora:
                raise ModelError(f"{file} lacks the matrix {kind!r} of {one_line(name)[:100]}; copy it again")
        part = name.partition(".")[0]
        if "alpha" not in lora and part in alphas:
            lora["alpha"] = torch.tensor(alphas[part])
        if scaling:
            lora["alpha"] = torch.tensor(scaling(lora["down"].shape[:1].numel()))
    return dict(loras)


def _why_not(key: str) -> str:
    for kind, pattern in _OTHERS.items():
        if re.search(pattern, key):
            return f"holds {kind}, which cannot be merged here: merge it with the tool that trained it"
    return f"is no LoRA: it holds {one_line(key)[:100]}; give a file with LoRA or LoCon weights only"


def _adapter_alphas(file: Path) -> dict[str, float]:
    """The alpha of each part, as newer versions of diffusers write peft's settings into the file.

    Raises ModelError for settings that change the formula.
    """
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
        alphas = {
            key.removesuffix(".lora_alpha"): float(value)
            for key, value in settings.items()
            if key.endswith(".lora_alpha")
        }
        odd = [key for key in settings if key.endswith((".use_rslora", ".alpha_pattern")) and settings[key]]
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{file} has wrong settings in {_METADATA}: {one_line(error)}") from None
    if odd:
        raise ModelError(
            f"{file} sets {one_line(odd[0])}, which cannot be merged here: merge it with the tool that"
            " trained it"
        )
    return alphas


def _peft_scaling(settings: dict[str, Any]) -> Callable[[int], float]:
    """The alpha of a layer by its rank r, so that alpha / r is the factor that peft's settings say.

    That is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023). Raises ValueError
    for settings that change the formula.
    """
    odd = [name for name in _ODD if settings.get(name)]
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        odd.append("init_lora_weights")
    if settings.get("peft_type") != "LORA":
        odd.append("peft_type")
    if odd:
        raise ValueError(f"{odd[0]} is {shown(settings.get(odd[0]))}; merge it with the tool that trained it")
    alpha, root = float(settings["lora_alpha"]), settings.get("use_rslora")
    return lambda rank: alpha * rank**0.5 if root else alpha


def _layers(unet: UNet, text_encoder: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """All names that a file may use for a convolution or linear layer, with the layer."""
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            theirs = unet_name(f"{name}.weight", unet.config).removesuffix(".weight")
            # Attention processors held the matrices in diffusers before 0.22.
            old = re.sub(r"\.(to_[a-z]+)(\.0)?$", r".processor.\1", theirs)
            for known in (name, theirs, old):
                for prefix in ("unet.", "diffusion_model.", ""):
                    yield prefix + known, layer
                yield f"lora_unet_{known.replace('.', '_')}", layer
    for name, layer in text_encoder.named_modules():
        if isinstance(layer, nn.Linear):
            old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", name)
            for known in (name, old):
                for prefix in ("text_encoder.", "text_encoder.text_model.", "text_model.", ""):
                    yield prefix + known, layer
            yield f"lora_te_text_model_{name.replace('.', '_')}", layer


@torch.no_grad()
def _merge(
    file: Path, name: str, layer: nn.Conv2d | nn.Linear, lora: Mapping[str, Tensor], scale: float
) -> None:
    weight = layer.weight
    kind = torch.promote_types(weight.dtype, torch.float32)
    down, up, mid = (
        None if tensor is None else tensor.to(weight.device, kind)
        for tensor in (lora["down"], lora["up"], lora.get("mid"))
    )
    try:
        change = _product(down, up, mid, weight)
        factor = scale * float(lora["alpha"]) / len(down) if "alpha" in lora else scale
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        shapes = [tuple(tensor.shape) for tensor in lora.values()]
        raise ModelError(
            f"{file} is a LoRA of another model: its tensors of {one_line(name)[:100]} have the shapes"
            f" {', '.join(map(str, shapes))}, but the weight is {tuple(weight.shape)}"
        ) from None
    merged = torch.add(weight.to(kind), change, alpha=factor).to(weight.dtype)
    if not finite(merged):
        raise ModelError(f"{file} makes the weight of {one_line(name)[:100]} infinite or NaN; copy it again")
    layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)


def _product(down: Tensor, up: Tensor, mid: Tensor | None, weight: Tensor) -> Tensor:
    """The product of a layer's matrices, in the shape of its weight.

    Raises RuntimeError or ValueError for shapes that do not fit.
    """
    rank = len(down)
    up = up.reshape(len(weight), rank)
    if mid is None:
        return (up @ down.reshape(rank, -1)).reshape(weight.shape)
    if mid.shape != (rank, rank, *weight.shape[2:]):
        raise ValueError(f"the matrix in the middle is {tuple(mid.shape)}")
    return torch.einsum("or,rskl,si->oikl", up, mid, down.reshape(rank, weight.shape[1]))
