"""Parameters and bytes of a compressed UNet; bytes as a file has them or as a packed file would have them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sdcomp.evaluation import weight_bytes
from sdcomp.export import OpenVINOUNet
from sdcomp.integer import Int8Model, PackedModel, packed_files, save_packed, to_packed
from sdcomp.pruning import disk_sizes
from sdcomp.quantization import QuantLayer, QuantModel
from sdcomp.quantization.scales import STORED
from sdcomp.study.results import Row
from sdcomp.study.variants import FP32, Variant


def share_gone(parameters: Sequence[Row], zeros: Sequence[Row]) -> dict[Variant, float]:
    """Percent of fp32's parameters that pruning removed or set to zero, by variant.

    The rows have the parameters of each variant, and the percentage of them that is zero.
    """
    zero = {row["variant"]: row["value"] / 100 for row in zeros}
    left = {row["variant"]: row["value"] * (1 - zero[row["variant"]]) for row in parameters}
    return {variant: 100 * (1 - kept / left[FP32]) for variant, kept in left.items()}


def packed_bytes(unet: nn.Module) -> int:
    """Bytes that a UNet's tensors would take if packed.

    `sdcomp.save(..., format="packed")` writes n-bit weights in about these bytes. It writes no weights of
    more bits without their zeros.

    A weight that simulates n bits counts n bits, any other number counts its own type. Scales count too.
    Where it saves bytes, zeros are left out: a tensor then counts one bit an entry for where they are.
    """
    rounded = {
        f"{name}.weight": layer
        for name, layer in unet.named_modules()
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None
    }
    total = 0
    for name, tensor in unet.state_dict().items():
        if name.endswith(".weight_integers"):
            continue  # counted with the weight
        layer = rounded.get(name)
        bits = layer.weight_quantizer.n_bits if layer else 8 * tensor.element_size()
        if name.endswith((".branch_down", ".branch_up")):
            bits = 8 * STORED.itemsize
        values = layer.integer_weight() if layer else tensor
        n, nonzero = values.numel(), int(values.count_nonzero())
        total += -(-min(n * bits, n + nonzero * bits) // 8)
    return total


def stored_bytes(unet: nn.Module) -> tuple[int, bool]:
    """Bytes of a UNet on disk, and whether `sdcomp.save` or `sdcomp.export` writes a file of that size.

    Quantized weights have the bytes of a packed file, which is written to a temporary folder and weighed.
    An exported UNet has the bytes of its weights.
    Where no file leaves zeros out (weights that are not quantized) the bytes are `packed_bytes`.
    """
    if isinstance(unet, Int8Model):
        return disk_sizes(unet.module)["dense"], True
    if isinstance(unet, OpenVINOUNet):
        return weight_bytes(unet), True
    if isinstance(unet, PackedModel) or (isinstance(unet, QuantModel) and _can_be_packed(unet)):
        return packed_file_bytes(unet), True
    packed = packed_bytes(unet)
    if packed < weight_bytes(unet):
        return packed, False
    return disk_sizes(unet)["dense"], True


def packed_file_bytes(model: QuantModel | PackedModel) -> int:
    """Bytes of the file of tensors that `sdcomp.save(..., format="packed")` writes for a UNet.

    Raises what `sdcomp.to_packed` raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_packed(to_packed(model) if isinstance(model, QuantModel) else model, folder)
        return (Path(folder) / packed_files.FILES.tensors).stat().st_size


def _can_be_packed(model: QuantModel) -> bool:
    """Whether all layers round their weights, and know how to round their inputs."""
    rounded = all(layer.weight_quantizer is not None for layer in model.quantized_layers())
    return rounded and model.state.weights and (model.calibrated or not model.state.activations)
