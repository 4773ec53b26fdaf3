"""Uniform symmetric quantization: its integers, its scales, and its simulation in floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.quantization.ranges import channel_clips

SCALE_METHODS = ("max", "mse")


def fake_quantize(x: Tensor, scale: float | Tensor, qmax: int) -> Tensor:
    """Round `x` to the multiples of `scale` from `-qmax` to `qmax` times it; in the type of `x`.

    Bit for bit what `torch.fake_quantize_per_tensor_affine` and `_per_channel_affine` give: the product
    with the float32 reciprocal of the scale is rounded half to even. `scale` is a number, or float32 and
    broadcasts with `x`. Infinite values are clipped and NaN stays NaN, on every device: PyTorch's operator
    on CUDA makes a number of it. On CPUs PyTorch's operators also fill a mask for the gradient and run
    several times longer than these four passes, which keep the memory format too.
    """
    integers = x.float() * (1 / scale)
    return integers.round_().clamp_(-qmax, qmax).mul_(scale).to(x.dtype)


@dataclass(frozen=True)
class UniformSymmetricQuantizer:
    """Integers from -(2^(n-1) - 1) to 2^(n-1) - 1, the same step everywhere, zero exact.

    The scale (the step) is the clipping range divided by the largest integer. `scale_method="max"` takes
    the largest magnitude as the range, "mse" the range with the least L_p error, p = 2.4, found from a
    histogram. With `channel_wise`, each slice along the first dimension has its own. Where everything is
    zero the scale is 1.

    Raises ValueError for bits out of 2 to 8 and for another method, TypeError for another type.
    """

    n_bits: int = 8
    channel_wise: bool = False
    scale_method: str = "max"

    def __post_init__(self) -> None:
        if isinstance(self.n_bits, bool) or not hasattr(self.n_bits, "__index__"):
            raise TypeError(f"n_bits must be a whole number, not {self.n_bits!r}")
        if not 2 <= self.n_bits <= 8:
            raise ValueError(f"n_bits must be 2 to 8, not {self.n_bits}")
        if not isinstance(self.channel_wise, bool):
            raise TypeError(f"channel_wise must be True or False, not {self.channel_wise!r}")
        if self.scale_method not in SCALE_METHODS:
            raise ValueError(f"scale_method must be 'max' or 'mse', not {self.scale_method!r}")

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return 2 ** (self.n_bits - 1) - 1

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """The scales of a tensor: float32, `(channels,)` if channel-wise, else `(1,)`.

        Raises UserError for values that are not finite.
        """
        magnitudes = (x.flatten(1) if self.channel_wise else x.reshape(1, -1)).float().abs()
        clip = magnitudes.amax(dim=1) if magnitudes.shape[1] else magnitudes.new_zeros(len(magnitudes))
        if not clip.is_meta and not clip.isfinite().all():
            raise UserError("a tensor with NaN or infinite values has no scale: find where they come from")
        if self.scale_method == "mse" and magnitudes.shape[1]:
            clip = channel_clips(magnitudes, self.qmax)
        scale = clip / self.qmax
        # Smaller steps have no finite reciprocal: such values are zeros too.
        return torch.where(scale > 2.0**-126, scale, 1.0)

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """The integers of a tensor at the given scales, int8."""
        integers = x.float() * (1 / self._broadcast(x, scale))
        return integers.round_().clamp_(-self.qmax, self.qmax).to(torch.int8)

    def fake_quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Integers times scales: what the integers stand for, in the type and memory format of `x`."""
        return fake_quantize(x, self._broadcast(x, scale), self.qmax)

    def __call__(self, x: Tensor) -> Tensor:
        """A tensor quantized with the scales found for it."""
        return self.fake_quantize(x, self.scale(x))

    def _broadcast(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (x.dim() - 1)) if self.channel_wise else scale.reshape([1] * x.dim())
