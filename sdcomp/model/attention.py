"""Attention: its product of queries, keys and values, and the UNet's layer around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.model.layers import Linear


class AttentionProduct(nn.Module):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, equation 1): the part of attention without weights.

    `forward(q, k, v)`: `(B, heads, N, d)`, twice `(B, heads, L, d)` -> `(B, heads, N, d)`. It is a module, so
    that a profiler finds it and another product can take its place.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens `(B, N, dim)` to a context `(B, L, context_dim)` or to themselves."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim, dim, bias=False)
        self.to_v = Linear(context_dim, dim, bias=False)
        self.product = AttentionProduct()
        self.to_out = nn.Sequential(Linear(dim, dim), nn.Identity())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(join_heads(self.product(q, k, v)))

    def extra_repr(self) -> str:
        """The number of heads, which the shapes of the weights do not tell."""
        return f"heads={self.heads}"


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """`(B, N, heads * d)` -> `(B, heads, N, d)`."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """`(B, heads, N, d)` -> `(B, N, heads * d)`."""
    return tokens.transpose(1, 2).flatten(2)
