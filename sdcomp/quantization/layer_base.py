"""The base of layers with simulated and with packed weights: quantizers, and the rounding of inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from sdcomp.quantization.input_grids import InputGrid, input_grids
from sdcomp.quantization.layer_specs import LayerSpec
from sdcomp.quantization.not_calibrated import calibrated_grids
from sdcomp.quantization.quantizer import UniformQuantizer
from sdcomp.quantization.shared_state import QuantState


class QuantizedLayer(nn.Module):
    """A layer with a `name`, a `spec`, and what the layers of its model share, `state`.

    The buffers `act_scale` and `act_zero_point` are calibrated scales, or None. So are the factors of a
    low-rank branch: `branch_down`, `(rank, in)` or `(rank, in, kh, kw)`, and `branch_up`, `(out, rank)`; see
    `sdcomp.quantization.methods.LowRankBranch`. `to` changes the types of parameters only, never those of
    buffers.
    """

    name: str
    spec: LayerSpec
    state: QuantState
    act_scale: Tensor | None
    act_zero_point: Tensor | None
    branch_down: Tensor | None
    branch_up: Tensor | None

    @property
    def split(self) -> int | None:
        """Channels of the first half of a skip concatenation, see `LayerSpec`."""
        return self.spec.split

    @property
    def weight_quantizer(self) -> UniformQuantizer | None:
        """The quantizer of the weight."""
        return self.spec.weight_quantizer

    @property
    def act_quantizer(self) -> UniformQuantizer | None:
        """The quantizer of the input."""
        return self.spec.act_quantizer

    def input_grids(self) -> list[InputGrid]:
        """The grids of the input in the current interval, one, or two with a split.

        Raises NotCalibratedError, which names the layer.
        """
        return calibrated_grids(self._input_grids, self.state.interval, self.name)

    def _read_input_grids(self) -> None:
        self._input_grids = input_grids(self.act_scale, self.act_zero_point, self.act_quantizer)

    def _round_tokens(self, x: Tensor) -> Tensor:
        """Round each token, a slice along the last dimension, to a grid of its own."""
        if isinstance(self, nn.Conv2d):
            # A kernel covers several pixels, so an image is the smallest part with one scale.
            return self.act_quantizer(x.flatten(1)).view_as(x)
        return self.act_quantizer(x)

    def branch_weight(self) -> Tensor | None:
        """Return the low-rank branch as a matrix `(out, columns)`, float32; None without one."""
        if self.branch_up is None:
            return None
        return self.branch_up.float() @ self.branch_down.float().flatten(1)

    def _plus_branch(self, output: Tensor, x: Tensor) -> Tensor:
        """Add the output of the low-rank branch for the input `x`, which is not rounded."""
        if self.branch_up is None:
            return output
        down, up = self.branch_down.to(x.dtype), self.branch_up.to(x.dtype)
        if isinstance(self, nn.Conv2d):
            inner = F.conv2d(x, down, None, self.stride, self.padding, self.dilation)
            return output + F.conv2d(inner, up[:, :, None, None])
        return output + F.linear(F.linear(x, down), up)

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._read_input_grids()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self
