"""A linear layer that treats every image of a batch alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4
"""Images up to which each has a product of its own; more images share one convolution."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose result for an image is the same bit for bit wherever it stands in the batch.

    `x`: `(B, tokens, in)` -> `(B, tokens, out)`. `F.linear` multiplies all rows of a batch at once, and CPU
    libraries compute the last rows of a product in another order than the others. Here every image has a
    product of its own or, in larger batches, is convolved with 1x1 kernels, which go image by image too.
    Inputs of other dimensions, other devices, and calls with gradients take `F.linear`.
    """
    if x.dim() != 3 or x.device.type != "cpu" or torch.is_grad_enabled() or len(x) < 2:
        return F.linear(x, weight, bias)
    if len(x) > _FEW and x.dtype in (torch.float32, torch.bfloat16):
        # Tokens are the pixels of channels-last maps as they lie in memory.
        maps = x.transpose(1, 2).unsqueeze(2)
        return F.conv2d(maps, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)
    out = x.new_empty(*x.shape[:2], len(weight))
    for image, result in zip(x, out, strict=True):
        if bias is None:
            torch.mm(image, weight.t(), out=result)
        else:
            torch.addmm(bias, image, weight.t(), out=result)
    return out


class Linear(nn.Linear):
    """`nn.Linear` on tokens, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
