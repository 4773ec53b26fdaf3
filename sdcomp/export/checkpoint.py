"""Plain checkpoints with the rounded weights baked in, for every tool that reads Stable Diffusion 1.x."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sdcomp import model
from sdcomp.integer import PackedModel
from sdcomp.integer.int8_model import float_tensors
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.model import ModelError, StableDiffusion, UNet
from sdcomp.model.channel_map import apply_channel_map, channel_map
from sdcomp.quantization import QuantLayer, QuantModel


def save_checkpoint(sd: StableDiffusion, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a model with the rounded weights of its UNet as plain weights; return the path.

    A `path` that ends in `.safetensors` gets the original layout in one file, which ComfyUI and diffusers'
    `from_single_file` read. Any other path gets a folder for diffusers' `from_pretrained`. `dtype` converts
    the written weights. A checkpoint cannot say how inputs are rounded, so they are not.

    Raises ModelError for a UNet that lost channels or blocks, and for one that is not ours; UserError for a
    file that cannot be written.
    """
    unet = rounded_unet(sd.unet)
    if channel_map(unet):
        raise ModelError(
            "the UNet has lost channels, and a checkpoint has the shapes of the whole model: export it with"
            " format='diffusers'"
        )
    layout = "original" if path.suffix == ".safetensors" else "diffusers"
    return model.save(sd.replace(unet=unet), path, dtype, layout)


def rounded_unet(unet: nn.Module) -> UNet:
    """Return the plain UNet with the rounded weights of a quantized or packed one; a plain one stays itself.

    Raises ModelError for a UNet that is not ours, or has another kind of quantization.
    """
    inside = our_unet(unet)
    if inside is unet:
        return unet
    layers = {layer.name: layer for layer in unet.quantized_layers()}
    state = dict(float_tensors(inside, layers))
    for name, layer in layers.items():
        state[f"{name}.weight"] = rounded_weight(layer)
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    with torch.device("meta"):
        plain = apply_channel_map(UNet(inside.config), channel_map(inside))
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def our_unet(unet: nn.Module) -> UNet:
    """Return our UNet itself, or the one inside a simulated or packed model.

    Raises ModelError for another module.
    """
    inside = unet.module if isinstance(unet, QuantModel | PackedModel) else unet
    if not isinstance(inside, UNet):
        raise ModelError(
            f"only our UNet, plain, simulated or packed, can be exported, not a {type(inside).__name__}"
        )
    return inside


def rounded_weight(layer: QuantLayer | NBitLayer) -> Tensor:
    """The weight that a layer multiplies with, its low-rank branch included.

    It has memory of its own where it is rounded; else it is the layer's.
    """
    if isinstance(layer, NBitLayer):
        weight = layer.dense_weight(torch.float32).clone()
    elif layer.weight_quantizer is None or not layer.state.weights:
        return layer.weight
    else:
        weight = layer.fake_weight()
        layer.clear_cache()  # or the model would keep every rounded weight beside the new UNet
    branch = layer.branch_weight()
    return weight if branch is None else weight + branch.view_as(weight).to(weight.dtype)
