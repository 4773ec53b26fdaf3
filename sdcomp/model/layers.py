"""Layers that compute every image of a batch in the same way.

Most CPU libraries compute a whole batch at once and treat its ends differently: they compute the last rows
of a matrix product, the last values of an element-wise function, and the values at the border between two
threads in another order or by other code. The last bits of an image would then depend on its place in the
batch. These layers compute image by image wherever that could happen. With gradients, on other devices and
during an export they are PyTorch's own.

Nor may the product of a single row depend on the address of the weight in memory, which changes when a model
is saved and loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 4
"""Up to this many images, `linear` computes one product for each; more images share one convolution."""
_GRAIN = 2**15
"""The least values that PyTorch's element-wise functions give a thread (`at::internal::GRAIN_SIZE`)."""
_ALIGNMENT = 64
"""PyTorch allocates memory at multiples of this many bytes; weights mapped from a file may be anywhere."""
_BLOCK = 64
"""Element-wise functions compute blocks of values; each instruction set's block size divides this one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tokens, `(B, tokens, in)` -> `(B, tokens, out)`, image by image.

    Inputs with another number of dimensions go to `F.linear` as they are.
    """
    plain = type(weight) in (Tensor, nn.Parameter)  # other tools' quantized weights are subclasses
    if plain and (x.dim() < 2 or x.shape[-2] == 1) and _is_misaligned(weight):
        weight = weight.clone()
    if x.dim() != 3 or not plain or _pytorch_will_do(x):
        return F.linear(x, weight, bias)
    if len(x) > _FEW and x.dtype in (torch.float32, torch.bfloat16):
        # A convolution computes image by image. Tokens have the memory layout of channels-last pixels.
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
    """`F.silu`, image by image if one call would not compute all values of the batch in the same way."""
    return _elementwise(partial(F.silu, inplace=inplace), x, inplace)


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`, image by image in the same cases as `silu`."""
    return _elementwise(F.gelu, x, False)


class Linear(nn.Linear):
    """`nn.Linear` that computes tokens with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class SiLU(nn.SiLU):
    """`nn.SiLU` that computes with `silu`."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x, self.inplace)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, image by image for channels-last maps, where threads share the batch's pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if _pytorch_will_do(x) or x.is_contiguous():
            return super().forward(x)
        return torch.cat([super(GroupNorm, self).forward(image) for image in x.split(1)])


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def is_quantized(module: nn.Module) -> bool:
    """Whether a module has quantized layers, simulated or integer."""
    return any(hasattr(layer, "integer_weight") for layer in module.modules())


def is_recorded() -> bool:
    """Whether a compiler or exporter is tracing the call: then no branch may depend on a tensor's values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_misaligned(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and not is_recorded() and weight.data_ptr() % _ALIGNMENT != 0


def _pytorch_will_do(x: Tensor) -> bool:
    """Whether the places of images cannot matter, or need not."""
    return x.device.type != "cpu" or torch.is_grad_enabled() or is_recorded() or len(x) < 2


def _elementwise(function: Callable[[Tensor], Tensor], x: Tensor, inplace: bool) -> Tensor:
    if _pytorch_will_do(x) or _computes_all_alike(x):
        return function(x)
    out = x if inplace else torch.empty_like(x)
    for image, result in zip(x, out, strict=True):
        function(image) if inplace else result.copy_(function(image))
    return out


def _computes_all_alike(x: Tensor) -> bool:
    """Whether one element-wise call computes every value of the batch with the same code.

    It does if each image, and each thread's share, consists of whole blocks. A view with gaps, such as one
    half of a projection, is computed row by row: there each share must consist of whole rows.
    """
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    block, most = _BLOCK if dense else x.shape[-1], torch.get_num_threads()
    # GELU has its own rule, and may use all threads for fewer values.
    shares = {min(most, -(-x.numel() // _GRAIN)), most}
    return x[0].numel() % block == 0 and all(x.numel() % (threads * block) == 0 for threads in shares)
