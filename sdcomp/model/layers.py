"""Layers that treat every image of a batch alike.

On a CPU most libraries go through a whole batch at once and treat its ends differently: the last rows of a
matrix product, the last values of an element-wise function and those at the border between two threads are
computed in another order or by other code. An image would then depend, in its last bits, on where it stands
in the batch. The layers here go image by image wherever that could happen. With gradients, on other devices
and while a model is exported they are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4
"""Images up to which `linear` makes a product for each; more images share one convolution."""
_GRAIN = 2**15
"""Values that PyTorch's element-wise functions give a thread at least (`at::internal::GRAIN_SIZE`)."""
_BLOCK = 64
"""A multiple of the values that element-wise functions compute at once, on every instruction set."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tokens, `(B, tokens, in)` -> `(B, tokens, out)`, image by image.

    Inputs of other dimensions take `F.linear`.
    """
    plain = type(weight) in (Tensor, nn.Parameter)  # other tools' quantized weights are subclasses
    if x.dim() != 3 or not plain or _takes_pytorchs(x):
        return F.linear(x, weight, bias)
    if len(x) > _FEW and x.dtype in (torch.float32, torch.bfloat16):
        # A convolution goes image by image. Tokens lie in memory as the pixels of channels-last maps do.
        maps = x.transpose(1, 2).unsqueeze(2)
        return F.conv2d(maps, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)
    out = x.new_empty(*x.shape[:2], len(weight))
    for image, result in zip(x, out, strict=True):
        if bias is None:
            torch.mm(image, weight.t(), out=result)
        else:
            torch.addmm(bias, image, weight.t(), out=result)
    return out


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`F.silu`, image by image where a batch's values would not all be computed alike."""
    return _elementwise(partial(F.silu, inplace=inplace), x, inplace)


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`, as `silu`."""
    return _elementwise(F.gelu, x, False)


class Linear(nn.Linear):
    """`nn.Linear` on tokens, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class SiLU(nn.SiLU):
    """`nn.SiLU`, by `silu`."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x, self.inplace)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, image by image for channels-last maps, whose pixels threads share out otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        if _takes_pytorchs(x) or x.is_contiguous():
            return super().forward(x)
        return torch.cat([super(GroupNorm, self).forward(image) for image in x.split(1)])


def is_quantized(module: nn.Module) -> bool:
    """Whether a module has quantized layers, simulated or in integers."""
    return any(hasattr(layer, "integer_weight") for layer in module.modules())


def is_recorded() -> bool:
    """Whether a compiler or exporter records what is computed, so that no branch may depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _takes_pytorchs(x: Tensor) -> bool:
    return x.device.type != "cpu" or torch.is_grad_enabled() or is_recorded() or len(x) < 2


def _elementwise(function: Callable[[Tensor], Tensor], x: Tensor, inplace: bool) -> Tensor:
    if _takes_pytorchs(x) or _are_alike(x):
        return function(x)
    out = x if inplace else torch.empty_like(x)
    for image, result in zip(x, out, strict=True):
        function(image) if inplace else result.copy_(function(image))
    return out


def _are_alike(x: Tensor) -> bool:
    """Whether every value of a batch is computed by the same code when all are computed at once.

    They are where each image, and what each thread gets, is made of whole blocks; of a view with gaps, such
    as one half of a projection, of whole rows, each of which is computed from its start.
    """
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    block, most = _BLOCK if dense else x.shape[-1], torch.get_num_threads()
    # GELU has a rule of its own, and may use all threads for fewer values.
    shares = {min(most, -(-x.numel() // _GRAIN)), most}
    return x[0].numel() % block == 0 and all(x.numel() % (threads * block) == 0 for threads in shares)
