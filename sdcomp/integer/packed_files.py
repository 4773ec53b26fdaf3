"""Models with n-bit weights as files: bytes and scales in safetensors, everything else in JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.files import resolve_input
from sdcomp.integer.bit_packing import block, packed_shape
from sdcomp.integer.execution import DTYPES
from sdcomp.integer.int8_model import float_tensors
from sdcomp.integer.model_files import (
    COMMON,
    Format,
    are_codes,
    check_common,
    differing,
    read_files,
    refuse_damaged,
    refuse_differing,
    write_files,
)
from sdcomp.integer.packed_layers import TENSORS as LAYER_TENSORS
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.integer.packed_model import PackedModel, Timesteps
from sdcomp.integer.sparse_packing import mask_shape, matches_mask
from sdcomp.model.config import UNetConfig
from sdcomp.model.device import check_device
from sdcomp.model.files.tensors import finite, listed
from sdcomp.quantization.layer_specs import LayerSpec, parameters_of, quantizer_of
from sdcomp.quantization.layers import QuantLayer, is_quantizable
from sdcomp.quantization.quantization_files import QuantizationFileError
from sdcomp.quantization.scales import STORED
from sdcomp.settings import ANYTHING, AnyOf, ListOf, OneOf, Rule, TableOf, Whole, shown

FILES = Format("packed", "packed.json", "packed.safetensors")
_QUANTIZER = AnyOf(OneOf(None), TableOf(ANYTHING))
_MOST = 10_000
"""Layers at most, and ways to quantize them."""
_SETTINGS: dict[str, Rule] = {
    **COMMON,
    "quantizers": ListOf(ListOf(_QUANTIZER, 2, 2), 1, _MOST),
    "layers": TableOf(Whole(0, _MOST)),
}
"""What a file's settings must be. `quantizers`: pairs for weights and inputs; `layers`: the pair of each."""


def save_packed(model: PackedModel, folder: str | Path) -> Path:
    """Write `packed.json` and `packed.safetensors` into a folder; returns it.

    The weights take n bits each. A layer of many zeros takes one bit for each weight, and n bits for each one
    that is not zero. All other tensors are stored in float16 if that holds them exactly, as for weights of
    float16 files, and otherwise in their own type. `load_packed` reads the files.

    Raises UserError where the folder cannot be written.
    """
    layers = {layer.name: layer for layer in model.quantized_layers()}
    pairs = {name: (layer.weight_quantizer, layer.act_quantizer) for name, layer in layers.items()}
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(pairs.values()))}
    settings = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "starts": model.starts,
        "train_timesteps": model.train_timesteps,
        "timestep_arg": model.timestep_arg,
        "quantizers": [[parameters_of(quantizer) for quantizer in pair] for pair in numbers],
        "layers": {name: numbers[pair] for name, pair in pairs.items()},
        "splits": {name: layer.split for name, layer in layers.items() if layer.split is not None},
    }
    state = {
        name: _stored_if_exact(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in model.module.state_dict().items()
    }
    return write_files(folder, FILES, model.module, settings, state, indent=1)


def _stored_if_exact(tensor: Tensor) -> Tensor:
    """Return a tensor in the type `STORED` if that holds all its values exactly."""
    narrow = tensor.to(STORED)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def load_packed(
    folder: str | Path,
    module: nn.Module | UNetConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PackedModel:
    """Load the model that `save_packed` wrote; its outputs are the saved one's bit for bit.

    The weights are mapped from the file, and read when they are used. `module`: one of the same architecture,
    whose weights do not matter, or the configuration of our UNet. Our UNet's files name theirs, pruned
    channels included, so it may be left out. The model computes in `dtype`, by default as saved.

    Raises QuantizationFileError, a ValueError, when a file is missing, damaged, or of another module.
    """
    device = check_device(device)
    (settings, specs), module, state = read_files(folder, FILES, module, lambda s: (s, _specs(s)))
    tensors = {name: {kind: state.pop(f"{name}.{kind}", None) for kind in LAYER_TENSORS} for name in specs}
    _check(resolve_input(folder) / FILES.tensors, module, specs, tensors, state)
    dtype = getattr(torch, settings["dtype"]) if dtype is None else dtype
    layers = {name: (spec, tensors[name]) for name, spec in specs.items()}
    timesteps = Timesteps(settings["starts"], settings["train_timesteps"], settings["timestep_arg"])
    return PackedModel(module, layers, state, timesteps, dtype).to(device)


def _specs(settings: Mapping[str, object]) -> dict[str, LayerSpec]:
    """How each layer is quantized. Raises UserError for settings that are wrong or missing."""
    check_common(settings, _SETTINGS)
    pairs = []
    for weights, inputs in settings["quantizers"]:
        if weights is None:
            raise UserError("quantizers: that of a weight is missing")
        pairs.append((quantizer_of(weights, weights=True), quantizer_of(inputs, weights=False)))
    layers, splits = settings["layers"], settings["splits"]
    if max(layers.values(), default=_MOST) >= len(pairs):
        raise UserError(f"layers: none, or one that has none of the {len(pairs)} quantizers")
    for name in splits:
        if name not in layers or pairs[layers[name]][0].granularity == "group":
            raise UserError(f"splits: {shown(name)} is no layer, or one with groups of columns")
    intervals = len(settings["starts"])
    return {name: LayerSpec(*pairs[i], intervals, splits.get(name)) for name, i in layers.items()}


def _check(
    file: Path,
    module: nn.Module,
    specs: Mapping[str, LayerSpec],
    tensors: Mapping[str, Mapping[str, Tensor | None]],
    floats: Mapping[str, Tensor],
) -> None:
    """Raise QuantizationFileError unless the tensors are of the module, quantized as the specs say."""
    layers, wanted = dict(module.named_modules()), dict(float_tensors(module, specs))
    wrong = differing(floats, wanted, DTYPES)
    for name, spec in specs.items():
        layer = layers.get(name)
        known = is_quantizable(layer) or isinstance(layer, QuantLayer | NBitLayer)
        if not known or not _fits(layer, spec, tensors[name]):
            wrong.append(name)
    refuse_differing(file, wrong)
    uneven = [name for name, spec in specs.items() if not _even(tensors[name], spec)]
    if uneven:
        raise QuantizationFileError(
            f"{file} is damaged: {listed(sorted(uneven))} have other numbers of values than their masks say; "
            "copy it again"
        )
    refuse_damaged(file, [name for name in specs if not _sound(tensors[name], specs[name])], floats)


def _even(tensors: Mapping[str, Tensor | None], spec: LayerSpec) -> bool:
    """Whether a sparse weight has as many values as its mask says."""
    mask = tensors["weight_mask"]
    return mask is None or matches_mask(tensors["packed_weight"], mask, spec.weight_quantizer.n_bits)


def _fits(layer: nn.Module, spec: LayerSpec, tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether tensors are those of a layer in shape and type."""
    weight = layer.shape if isinstance(layer, NBitLayer) else tuple(layer.weight.shape)
    if spec.split is not None and not (len(weight) == 4 and spec.split < weight[1]):
        return False
    wanted = dict(_wanted(weight, spec))
    if (packed := tensors["packed_weight"]) is not None and tensors["weight_mask"] is not None:
        # How many values there are, the mask says: see `_check`.
        blocks = packed.shape[1] if packed.dim() == 3 else 0
        wanted["packed_weight"] = ((block(spec.weight_quantizer.n_bits)[1], blocks, 1), (torch.uint8,))
        wanted["weight_mask"] = (mask_shape(weight), (torch.uint8,))
    if (up := tensors["branch_up"]) is not None:
        rank = max(up.shape[-1:].numel(), 1)
        wanted["branch_down"] = ((rank, *weight[1:]), DTYPES)
        wanted["branch_up"] = ((weight[0], rank), DTYPES)
    if layer.bias is not None:
        wanted["bias"] = (weight[:1], DTYPES)
    return all(
        (tensor is None) == (kind not in wanted)
        and (tensor is None or (tuple(tensor.shape) == wanted[kind][0] and tensor.dtype in wanted[kind][1]))
        for kind, tensor in tensors.items()
    )


def _wanted(weight: tuple[int, ...], spec: LayerSpec) -> Iterator[tuple[str, tuple]]:
    """Shape and allowed types of each tensor of a layer with a weight of this shape, except the bias."""
    quantizer, halves = spec.weight_quantizer, () if spec.split is None else (2,)
    columns = prod(weight[1:])
    grid = {
        "tensor": (*halves, 1),
        "channel": (*halves, weight[0]),
        "group": (weight[0], -(-columns // quantizer.group_size)),
    }[quantizer.granularity]
    yield "packed_weight", (packed_shape(weight, quantizer.n_bits), (torch.uint8,))
    yield "weight_scale", (grid, DTYPES)
    if not quantizer.symmetric:
        yield "weight_zero_point", (grid, (torch.uint8,))
    if spec.calibrated:
        yield "act_scale", ((spec.intervals, *halves), DTYPES)
        if not spec.act_quantizer.symmetric:
            yield "act_zero_point", ((spec.intervals, *halves), DTYPES)


def _sound(tensors: Mapping[str, Tensor | None], spec: LayerSpec) -> bool:
    """Whether a layer's values can be; an input scale of 0 is one that is not calibrated."""
    _, _, scale, zeros, act_scale, act_zeros, down, up, bias = (tensors[kind] for kind in LAYER_TENSORS)
    floats = (t for t in (scale, act_scale, act_zeros, down, up, bias) if t is not None)
    return (
        all(finite(t) for t in floats)
        and bool((scale > 0).all())
        and (zeros is None or bool((zeros <= spec.weight_quantizer.qmax).all()))
        and (act_scale is None or bool((act_scale >= 0).all()))
        and (act_zeros is None or are_codes(act_zeros, spec.act_quantizer.qmax))
    )
