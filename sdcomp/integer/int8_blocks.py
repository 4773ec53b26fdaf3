"""Our UNet's blocks with less to do between the integer kernels.

Each block computes what its floating-point class computes, in fewer passes over memory. It quantizes an
input that several layers read once. The kernels add sums in place and apply GELU to their product where they
can. A feed-forward computes some tokens at a time, so that its wide middle stays in the cache. Layers that
are not quantized, or not in a way that allows it, run as usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.integer.bfloat16_attention import BFloat16AttentionProduct, attention_dtype
from sdcomp.integer.int8_layers import Int8Conv2d, Int8GatedLinear, Int8Layer, Int8Linear
from sdcomp.model.attention import AttentionProduct, CrossAttention, join_heads, split_heads
from sdcomp.model.bypass import Bypass
from sdcomp.model.layers import silu
from sdcomp.model.unet import (
    GEGLU,
    FeedForward,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
)

_ROWS = 1024
"""Tokens of a feed-forward at a time: at SD 1.5's widths their middle stays in the cache."""
_LARGE = 2**17
"""From this many values per image on, the images of a batch go through norms and blocks one by one."""


def layer_kind(module: nn.Module, name: str, split: int | None) -> type[Int8Layer]:
    """Return the class of the integer layer that takes the place of one of a module's layers."""
    parent, _, own = name.rpartition(".")
    if isinstance(module.get_submodule(name), nn.Conv2d):
        return Int8Conv2d
    gated = own == "proj" and isinstance(module.get_submodule(parent), GEGLU) and split is None
    return Int8GatedLinear if gated else Int8Linear


def specialize(module: nn.Module) -> nn.Module:
    """Replace the blocks of a module, in place, by the integer blocks below; returns the module.

    The new blocks hold the same layers. If the module itself is such a block, the new block is returned.
    """
    for name, child in module.named_children():
        setattr(module, name, specialize(child))
    return _BLOCKS[type(module)](module) if type(module) in _BLOCKS else module


class _SpecialBlock(nn.Module):
    """A block that takes over the layers and other attributes of a plain block."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)


def _add(layer: nn.Module, x: Tensor, accumulate: Tensor | None) -> Tensor:
    """Compute `accumulate += layer(x)` in place, in the type of `accumulate`."""
    if isinstance(layer, Int8Layer):
        return layer(x, accumulate, accumulate.dtype)
    return accumulate.add_(layer(x.to(accumulate.dtype)))


def _products(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """Apply layers without a split to one input, for attention; quantize it once if their grids are equal."""
    dtype = attention_dtype(x.dtype)
    integers = [layer for layer in layers if isinstance(layer, Int8Linear)]
    if len(integers) < len(layers) or len({layer.input_grids()[0] for layer in integers}) > 1:
        return [layer(x, dtype=dtype) if layer in integers else layer(x).to(dtype) for layer in layers]
    quantized = layers[0].quantize(x)
    return [layer.multiply([quantized], dtype) for layer in layers]


class Int8ResBlock(_SpecialBlock, ResBlock):
    """`ResBlock`, activations and sums in place."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self._convolve(self.in_layers, x).add_(self.emb_layers(emb)[:, :, None, None])
        if isinstance(self.skip_connection, nn.Identity):
            return self._convolve(self.out_layers, h).add_(x)
        return self._convolve(self.out_layers, h, self.skip_connection(x))

    @staticmethod
    def _convolve(layers: nn.Sequential, x: Tensor, accumulate: Tensor | None = None) -> Tensor:
        """Apply norm, activation and convolution; add the result to `accumulate`, if given, in place."""
        norm, conv = layers[0], layers[-1]
        if x[0].numel() < _LARGE or not isinstance(conv, Int8Conv2d) or conv.split is not None:
            h = silu(norm(x), inplace=True)
            return conv(h) if accumulate is None else _add(conv, h, accumulate)
        # Image by image, as the norm goes anyway, so that only the integers leave the cache.
        images = (F.group_norm(i, norm.num_groups, norm.weight, norm.bias, norm.eps) for i in x.split(1))
        integers = torch.cat([conv.quantize(F.silu(image, inplace=True)) for image in images])
        return conv.multiply([integers], x.dtype, accumulate)


class Int8AttentionProduct(_SpecialBlock, BFloat16AttentionProduct):
    """`AttentionProduct`, faster in bfloat16."""


class Int8CrossAttention(_SpecialBlock, CrossAttention):
    """`CrossAttention`; adds its output to `accumulate`, in place, if that is given."""

    def forward(self, x: Tensor, context: Tensor | None = None, accumulate: Tensor | None = None) -> Tensor:
        if context is None:
            q, k, v = _products([self.to_q, self.to_k, self.to_v], x)
        else:
            (q,), (k, v) = _products([self.to_q], x), _products([self.to_k, self.to_v], context)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        out = join_heads(self.product(q, k.contiguous(), v.contiguous()))
        if accumulate is None:
            return self.to_out(out.to(x.dtype))
        return _add(self.to_out[0], out, accumulate)


class Int8FeedForward(_SpecialBlock, FeedForward):
    """`FeedForward`, some tokens at a time; adds its output to `accumulate`, in place, if that is given."""

    def forward(self, x: Tensor, accumulate: Tensor | None = None) -> Tensor:
        wide, narrow = self.net[0].proj, self.net[2]
        if not (isinstance(wide, Int8GatedLinear) and isinstance(narrow, Int8Linear)):
            out = super().forward(x)
            return out if accumulate is None else accumulate.add_(out)
        accumulate = x.new_zeros(x.shape) if accumulate is None else accumulate
        pieces = (t.flatten(0, -2).split(_ROWS) for t in (wide.quantize(x), accumulate))
        for rows, out in zip(*pieces, strict=True):
            narrow(wide.gated(rows), out, x.dtype)
        return accumulate


class Int8TransformerBlock(_SpecialBlock, TransformerBlock):
    """`TransformerBlock`; `update` overwrites its contiguous input with its output."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.update(x.clone(memory_format=torch.contiguous_format), context)

    def update(self, x: Tensor, context: Tensor) -> Tensor:
        for block, norm, *text in (
            (self.attn1, self.norm1, None),
            (self.attn2, self.norm2, context),
            (self.ff, self.norm3),
        ):
            # A removed block leaves a bias, and does not add it itself.
            x = x.add_(block(x)) if isinstance(block, Bypass) else block(norm(x), *text, x)
        return x


class Int8SpatialTransformer(_SpecialBlock, SpatialTransformer):
    """`SpatialTransformer`; pixels with the channels last are tokens without a copy."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).contiguous()
        context = context.expand(len(x), -1, -1)
        # Large images go one by one, so that values between the kernels are still in the cache.
        rows = 1 if tokens[0].numel() >= _LARGE else len(tokens)
        for image, text in zip(tokens.flatten(1, 2).split(rows), context.split(rows), strict=True):
            for block in self.transformer_blocks:
                block.update(image, text)
        return self.proj_out(tokens.permute(0, 3, 1, 2)).add_(x)


class Int8Upsample(_SpecialBlock, Upsample):
    """`Upsample`; quantizes before it repeats pixels, so that it rounds a quarter of the values."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.conv, Int8Conv2d):
            return super().forward(x)
        integers = F.interpolate(self.conv.quantize(x), scale_factor=2, mode="nearest")
        return self.conv.multiply([integers], x.dtype)


_BLOCKS: dict[type, type[_SpecialBlock]] = {
    ResBlock: Int8ResBlock,
    AttentionProduct: Int8AttentionProduct,
    CrossAttention: Int8CrossAttention,
    FeedForward: Int8FeedForward,
    TransformerBlock: Int8TransformerBlock,
    SpatialTransformer: Int8SpatialTransformer,
    Upsample: Int8Upsample,
}
