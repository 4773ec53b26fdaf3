"""Attention in bfloat16, on CPUs that multiply bfloat16 faster than float32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sdcomp.model.attention import AttentionProduct

_SCORES = 2**20
"""Scores held at a time, 2 MiB of them, so that they are still in the cache when they are read again."""


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16 or AMX)."""
    # PyTorch has no public function for this that all its versions know; without them: float32.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of queries, keys and values in a model that computes in `dtype`."""
    return torch.bfloat16 if dtype == torch.bfloat16 and fast_bfloat16() else torch.float32


class BFloat16AttentionProduct(AttentionProduct):
    """`AttentionProduct`; bfloat16 is multiplied by oneDNN, some rows of the scores at a time.

    PyTorch's own attention was no faster in bfloat16 than in float32 on a CPU with AVX512-BF16, and this was,
    at SD 1.5's sizes. Scores and probabilities are rounded to bfloat16, sums are float32. For inference only:
    where gradients are on, and for other types, PyTorch's own runs.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype != torch.bfloat16 or torch.is_grad_enabled() or not q.numel() * k.numel():
            return super().forward(q, k, v)
        shape, length, root = q.shape, k.shape[2], q.shape[-1] ** -0.5
        q, k, v = q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
        out = q.new_empty(q.shape)
        rows = min(shape[2], max(1, _SCORES // length))
        heads = max(1, _SCORES // (shape[2] * length))
        for some in zip(*(x.split(heads) for x in (q, k, v, out)), strict=True):
            keys, values = some[1:3]
            for queries, result in zip(*(x.split(rows, dim=1) for x in (some[0], some[3])), strict=True):
                scores = torch.baddbmm(q.new_empty(()), queries, keys, beta=0, alpha=root)
                torch.bmm(scores.softmax(-1), values, out=result)
        return out.view(shape)
