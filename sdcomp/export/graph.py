"""A quantized UNet as a graph for other engines: integer weights, and operators that round the inputs.

Each engine has its own operators, its `Dialect`. The layers around them are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.export.checkpoint import our_unet, rounded_weight
from sdcomp.integer.packed_layers import NBitLayer
from sdcomp.model import StableDiffusion, UNet
from sdcomp.model.attention import AttentionProduct
from sdcomp.model.rebuild import normal_tensors, rebuild
from sdcomp.model.unet import GEGLU
from sdcomp.quantization import QuantLayer
from sdcomp.quantization.attention import QuantAttentionScores, refuse_quantized_products
from sdcomp.quantization.input_grids import InputGrid, input_grids
from sdcomp.quantization.methods import refuse_branches
from sdcomp.quantization.not_calibrated import calibrated_grids, require_calibrated

INPUTS = ("latents", "timestep", "context")
"""The inputs of an exported UNet, float32: `(B, C, h, w)`, `(1,)` and `(B, L, context_dim)`."""

DYNAMIC = ({0: "batch", 2: "height", 3: "width"}, {}, {0: "batch", 1: "length"})
"""The dimensions of each input that each call may choose, by number."""


@dataclass(eq=False)
class Interval:
    """What the layers share while a graph is recorded: the number of the timestep's interval, `(1,)`."""

    index: Tensor | None = None


@dataclass(eq=False)
class Grids:
    """How an input is rounded: `rows` has one grid for each timestep interval, as plain numbers."""

    rows: list[InputGrid]
    affine: bool
    interval: Interval

    @property
    def fixed(self) -> bool:
        """Whether all intervals have the same grid, so that it can be a constant of the graph."""
        return len(set(self.rows)) == 1

    @property
    def narrow(self) -> bool:
        """Whether the grid has fewer levels than 8 bits hold."""
        return self.rows[0].high - self.rows[0].low < 254

    def current(self) -> Tensor:
        """Scale, lowest and highest multiple of the timestep's interval, `(3,)`, chosen in the graph."""
        if self.fixed:
            return torch.tensor(self.rows[0])
        return torch.tensor(self.rows).index_select(0, self.interval.index)[0]


class Dialect(Protocol):
    """An engine's operators."""

    def dequantize(self, integers: Tensor, scale: Tensor) -> Tensor:
        """Multiply int8 `(out, ...)` by scales `(out,)`, or `(out, columns)` by `(out, groups)`: float32."""

    def quantize(self, x: Tensor, grids: Grids) -> tuple[Tensor, Tensor | None]:
        """Round an input. The second result, or None, is a scale that the layer's product still lacks."""

    def integers(self, x: Tensor, high: int) -> Tensor:
        """Round to whole numbers from -`high` to `high`, at most 127; engines may multiply them as int8."""


class GraphLayer(nn.Module):
    """A convolution or linear layer in the operators of a dialect.

    A layer with a split (see `LayerSpec`) multiplies the two halves of its input apart. `rows` of the weight
    are the outputs that this one computes.
    """

    def __init__(
        self,
        layer: QuantLayer | NBitLayer,
        dialect: Dialect,
        interval: Interval,
        rows: slice = slice(None),
    ) -> None:
        super().__init__()
        self.dialect, self.conv = dialect, isinstance(layer, nn.Conv2d)
        if self.conv:
            if layer.padding_mode != "zeros":
                raise UserError(f"layer {layer.name} cannot be exported: its padding is {layer.padding_mode}")
            self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        out, columns, *kernel = layer.shape if isinstance(layer, NBitLayer) else layer.weight.shape
        self.sizes = [columns] if layer.split is None else [layer.split, columns - layer.split]
        self.shapes = [(len(range(out)[rows]), size, *kernel) for size in self.sizes]
        self.grids = _grids(layer, interval)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float()[rows])
        for i, (weight, scale) in enumerate(_weights(layer, self.sizes, kernel)):
            self.register_buffer(f"weight{i}", weight[rows])
            self.register_buffer(f"scale{i}", None if scale is None else scale[rows])

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.quantize(x))

    def quantize(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Round an input or its halves; see `Dialect.quantize`."""
        parts = [x] if len(self.sizes) == 1 else x.split(self.sizes, dim=1 if self.conv else -1)
        if self.grids is None:
            return [(part, None) for part in parts]
        return [self.dialect.quantize(part, grids) for part, grids in zip(parts, self.grids, strict=True)]

    def multiply(self, parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """The output for what `quantize` returned."""
        first, *rest = (self._product(i, *part) for i, part in enumerate(parts))
        return first + rest[0] if rest else first

    def _product(self, i: int, x: Tensor, factor: Tensor | None) -> Tensor:
        """The product of part `i` of the input; the first part's has the bias."""
        weight, scale = getattr(self, f"weight{i}"), getattr(self, f"scale{i}")
        if scale is not None:
            weight = self.dialect.dequantize(weight, scale)
        weight, bias = weight.reshape(self.shapes[i]), self.bias if i == 0 else None
        if factor is None:
            return self._multiply(x, weight, bias)
        product = self._multiply(x, weight, None) * factor
        if bias is None:
            return product
        return product + (bias[:, None, None] if self.conv else bias)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, *self.geometry) if self.conv else F.linear(x, weight, bias)


class GraphGEGLU(nn.Module):
    """`GEGLU` as two layers: an engine then computes GELU within one of them, and copies no halves."""

    def __init__(self, layer: QuantLayer | NBitLayer, dialect: Dialect, interval: Interval) -> None:
        super().__init__()
        hidden = layer.out_features // 2
        self.value = GraphLayer(layer, dialect, interval, slice(hidden))
        self.gate = GraphLayer(layer, dialect, interval, slice(hidden, None))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.gate.quantize(x)  # once: both layers have the grids of the one that they were made of
        return self.value.multiply(parts) * F.gelu(self.gate.multiply(parts))


class GraphAttentionScores(AttentionProduct):
    """`QuantAttentionScores` in the operators of a dialect."""

    def __init__(self, n_bits: int, dialect: Dialect) -> None:
        super().__init__()
        self.dialect, self.high = dialect, 2 ** (n_bits - 1) - 1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, q_scale), (k, k_scale) = self._integers(q), self._integers(k)
        # One factor after the other: OpenVINO cannot compile their product as a single one.
        scores = (q @ k.transpose(-1, -2)) * (q_scale * q.shape[-1] ** -0.5) * k_scale
        return scores.softmax(-1) @ v

    def _integers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of `(B, heads, N, d)`, and their scales `(B, heads, 1, 1)`."""
        largest = x.abs().amax(-1, keepdim=True).amax(-2, keepdim=True)
        # At least the smallest normal number: an engine may take smaller ones for 0.
        scale = (largest / self.high).clamp(min=torch.finfo(torch.float32).tiny)
        return self.dialect.integers(x / scale, self.high), scale


def _weights(
    layer: QuantLayer | NBitLayer, sizes: list[int], kernel: list[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """Integers and scales of a weight or of its halves; floats and None where int8 cannot hold it.

    So it is for 8 bits with a zero point, and for groups where the last one is narrower.
    """
    quantizer = layer.weight_quantizer
    grouped = quantizer is not None and quantizer.granularity == "group"
    if (
        quantizer is None
        or not layer.state.weights
        or quantizer.integer_dtype != torch.int8
        or (grouped and sizes[0] * prod(kernel) % quantizer.group_size)
    ):
        return [(part, None) for part in rounded_weight(layer).detach().float().split(sizes, dim=1)]
    integers, scale = layer.integer_weight(), layer.weight_scale.float()
    if grouped:
        return [(integers.flatten(1), scale)]
    scales = [scale] if layer.split is None else scale
    parts = integers.split(sizes, dim=1)
    return [(part.contiguous(), s.expand(len(part))) for part, s in zip(parts, scales, strict=True)]


def _grids(layer: QuantLayer | NBitLayer, interval: Interval) -> list[Grids] | None:
    """The grids of an input or of its halves; None where it is not rounded.

    Raises UserError for scales that each call finds anew, NotCalibratedError for a layer without scales.
    """
    quantizer = layer.act_quantizer
    if quantizer is None or not layer.state.activations:
        return None
    if not layer.spec.calibrated:
        raise UserError(f"layer {layer.name} cannot be exported: its input has a scale for each token")
    rows = input_grids(layer.act_scale, layer.act_zero_point, quantizer)
    rows = [calibrated_grids(rows, i, layer.name) for i in range(len(rows))]
    return [Grids(list(part), not quantizer.symmetric, interval) for part in zip(*rows, strict=True)]


def _twin(
    unet: UNet, layer: QuantLayer | NBitLayer, dialect: Dialect, interval: Interval
) -> tuple[str, nn.Module]:
    """The module that takes the place of a layer, or of the GEGLU around it, and the name of that place."""
    parent = layer.name.rpartition(".")[0]
    if isinstance(unet.get_submodule(parent), GEGLU):
        return parent, GraphGEGLU(layer, dialect, interval)
    return layer.name, GraphLayer(layer, dialect, interval)


class GraphUNet(nn.Module):
    """A UNet in the operators of a dialect: `forward(latents, timestep, context)`, see `INPUTS`.

    The grids of the inputs are those of the timestep's interval. `unet`: plain, simulated or packed.

    Raises ModelError for a UNet that is not ours, or that runs in int8 already; NotCalibratedError for one
    without scales; UserError for a layer that cannot be exported.
    """

    def __init__(self, unet: nn.Module, dialect: Dialect) -> None:
        super().__init__()
        inside = our_unet(unet)
        quantized = inside is not unet
        self.interval = Interval()
        self.register_buffer("starts", torch.tensor(unet.starts if quantized else [0]))
        if quantized and unet.state.activations:
            require_calibrated(unet, "first")
        refuse_quantized_products(unet, "an exported graph", can_compute_scores=True)
        if quantized:
            refuse_branches(unet, "an exported graph")
        layers = unet.quantized_layers() if quantized else []
        with normal_tensors():
            twins = dict(_twin(inside, layer, dialect, self.interval) for layer in layers)
            if quantized and unet.state.activations:
                twins |= {
                    name: GraphAttentionScores(product.quantizer.n_bits, dialect)
                    for name, product in inside.named_modules()
                    if isinstance(product, QuantAttentionScores)
                }
            self.module = rebuild(inside, twins).float().requires_grad_(False)
        self.eval()

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        self.interval.index = (timestep >= self.starts).sum(0, keepdim=True) - 1
        return self.module(latents, timestep, context)


def example_inputs(sd: StableDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the model's own size, two rows, to record a graph with."""
    config, side = sd.config, sd.config.image_size // sd.config.vae.downsampling
    context = torch.zeros(2, config.text["max_position_embeddings"], config.unet.context_dim)
    return torch.zeros(2, config.unet.in_channels, side, side), torch.full((1,), 500.0), context


@contextmanager
def deploy_extra() -> Iterator[None]:
    """Turn the ImportError of a package that is not installed into one sentence."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed: in the repository, run pip install -e '.[deploy]'"
        ) from None
