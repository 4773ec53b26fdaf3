"""Bytes of a compressed UNet, as a file has them or as a packed file would have them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from sdcomp.evaluation import weight_bytes
from sdcomp.integer import Int8Model, packed_files, save_packed, to_packed
from sdcomp.pruning import disk_sizes
from sdcomp.quantization import QuantLayer, QuantModel


def packed_bytes(unet: nn.Module) -> int:
    """Bytes that a UNet's tensors would take if packed.

    `sdcomp.save(..., format="packed")` writes n-bit weights in about these bytes, zeros included.

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
        values = layer.integer_weight() if layer else tensor
        n, nonzero = values.numel(), int(values.count_nonzero())
        total += -(-min(n * bits, n + nonzero * bits) // 8)
    return total


def stored_bytes(unet: nn.Module) -> tuple[int, bool]:
    """Bytes of a UNet on disk, and whether `sdcomp.save` writes a file of that size.

    Where it does not (simulated low bits, zeros left out) the bytes are `packed_bytes`.
    """
    if isinstance(unet, Int8Model):
        return disk_sizes(unet.module)["dense"], True
    packed = packed_bytes(unet)
    if packed < weight_bytes(unet):
        return packed, False
    return disk_sizes(unet)["dense"], True


def packed_file_bytes(model: QuantModel) -> int:
    """Bytes of the file of tensors that `sdcomp.save(..., format="packed")` writes for a UNet.

    Raises what `sdcomp.to_packed` raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_packed(to_packed(model), folder)
        return (Path(folder) / packed_files.FILES.tensors).stat().st_size
