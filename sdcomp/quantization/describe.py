"""A quantized model as a table of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sdcomp.model.kinds import require_kind
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.scales import Grid

if TYPE_CHECKING:
    import pandas as pd


def describe(model: QuantModel) -> pd.DataFrame:
    """A table of a model's convolutions and linear layers, quantized or not.

    Columns: `name`, `kind`, `shape` of the weight, `weight_bits`, `act_bits`, `weight_scale` (median over
    channels), `act_scale` (as text: the lowest and highest over the intervals), the `weight_clipped` and
    `act_clipped` shares of values beyond the range, `split` (channels of the first half) and `left_out`:
    the reason why a layer is not quantized. Raises TypeError for another kind of model.
    """
    require_kind(model, QuantModel, "describe takes a QuantModel")
    import pandas as pd

    rows = []
    for name, layer in model.module.named_modules():
        if isinstance(layer, QuantLayer):
            row = _quantized(layer)
        elif name in model.left_out:
            row = {"left_out": f"filter {model.left_out[name]!r}"}
        elif isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            row = {"left_out": "neither nn.Conv2d nor nn.Linear"}
        else:
            continue
        kind = type(layer).__name__.removeprefix("Quant")
        rows.append(
            {"name": name, "kind": kind, "shape": tuple(layer.weight.shape), "left_out": "", "act_scale": ""}
        )
        rows[-1] |= row
    columns = ["name", "kind", "shape", "weight_bits", "act_bits", "weight_scale", "act_scale"]
    columns += ["weight_clipped", "act_clipped", "split", "left_out"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype(dict.fromkeys(("weight_bits", "act_bits", "split"), "Int64"))


def _quantized(layer: QuantLayer) -> dict[str, object]:
    row: dict[str, object] = {"split": layer.split}
    if layer.weight_quantizer is not None:
        row["weight_bits"] = layer.weight_quantizer.n_bits
        row["weight_scale"] = layer.weight_scale.median().item()
        row["weight_clipped"] = _weight_clipped(layer)
    if layer.act_quantizer is not None:
        row["act_bits"] = layer.act_quantizer.n_bits
        known = layer.act_scale[layer.act_scale > 0] if layer.spec.calibrated else ()
        if not layer.spec.calibrated:
            row["act_scale"] = "of each token"
        elif len(known):
            ends = dict.fromkeys(f"{end.item():.3g}" for end in known.aminmax())
            row["act_scale"] = " to ".join(ends)
            row["act_clipped"] = layer.act_clipped[layer.act_scale > 0].mean().item()
        else:
            row["act_scale"] = "not calibrated"
    return row


@torch.no_grad()
def _weight_clipped(layer: QuantLayer) -> float:
    """The share of weights beyond the clipping range."""

    def beyond(half: torch.Tensor, grid: Grid) -> torch.Tensor:
        scale, low, high = layer.weight_quantizer.broadcast_grid(half, grid)
        # A value at the end of the range may be a last bit beyond it, by the scale's own rounding.
        return (half > scale * high * (1 + 1e-6)) | (half < scale * low * (1 + 1e-6))

    return layer.per_half(beyond).float().mean().item()
