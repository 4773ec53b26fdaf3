"""Convolutions and linear layers that simulate quantized weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor, nn

from sdcomp.errors import UserError
from sdcomp.model.layers import Linear, linear
from sdcomp.quantization.quantizer import UniformSymmetricQuantizer, fake_quantize


class NotCalibratedError(UserError, RuntimeError):
    """A layer is to quantize its input and has no scale for it."""


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Tensors made in here can be changed and trained later, also if the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(eq=False)
class QuantState:
    """What the quantized layers of one model share: switches, the timestep's interval, the last input.

    `observer(layer, input)` is there while calibrating: it sees each layer's input and says at which
    scales to quantize it, one for each part; None leaves it as it is.
    """

    weights: bool = True
    activations: bool = True
    interval: int = 0
    timestep: float = 0.0
    observer: Callable[[QuantLayer, Tensor], list[float] | None] | None = None
    _last: tuple[Tensor, int, tuple, Tensor] | None = field(default=None, init=False, repr=False)

    def quantize(self, x: Tensor, scales: list[float], qmax: int, split: int | None) -> Tensor:
        """The input fake-quantized; queries, keys and values get the one copy made for the first of them."""
        key = (*scales, qmax, split)
        if self._last is not None and not x.is_inference():
            before, version, made_for, made = self._last
            if before is x and version == x._version and made_for == key:
                return made
        if split is None:
            made = fake_quantize(x, scales[0], qmax)
        else:
            halves = (x.narrow(1, 0, split), x.narrow(1, split, x.shape[1] - split))
            made = torch.cat([fake_quantize(h, s, qmax) for h, s in zip(halves, scales, strict=True)], 1)
        self._last = None if x.is_inference() else (x, x._version, key, made)
        return made

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None


def calibrated(scales: list[list[float]], interval: int, layer: str) -> list[float]:
    """Of a layer's input scales, those in an interval. Raises NotCalibratedError, which names the layer."""
    if min(scales[interval]) <= 0:
        where = f" in interval {interval}" if len(scales) > 1 else ""
        raise NotCalibratedError(
            f"layer {layer} has no scale for its input{where}: calibrate the model first, with prompts that"
            " make this layer run, or switch the activations off"
        )
    return scales[interval]


class QuantLayer(nn.Module):
    """What `QuantConv2d` and `QuantLinear` have in common.

    `weight`, `bias`: the original ones, full precision, their memory shared with the original layer.
    `weight_quantizer`, `act_quantizer`: bits and method; None leaves that side in full precision.
    `split`: the input channels of the first half of a skip concatenation whose halves have their own
    scales, else None.
    `weight_scale`: float32 `(out,)`, or `(1,)` per tensor; with a split `(2, out)` or `(2, 1)`.
    `act_scale`: float32 `(k,)`, one for each timestep interval; with a split `(k, 2)`; 0 = not calibrated.
    `act_clipped`: of the same shape, the share of calibration values beyond the range.
    Scales are buffers, and stay float32 when the model is converted.
    """

    weight: nn.Parameter
    weight_scale: Tensor | None
    act_scale: Tensor | None
    act_clipped: Tensor | None

    def _start(
        self,
        name: str,
        state: QuantState,
        weight_quantizer: UniformSymmetricQuantizer | None,
        act_quantizer: UniformSymmetricQuantizer | None,
        intervals: int,
        split: int | None,
    ) -> None:
        """Find the weight scales and lay out the input scales; takes the place of a constructor."""
        self.name, self.state, self.split = name, state, split
        self.weight_quantizer, self.act_quantizer = weight_quantizer, act_quantizer
        scale = acts = None
        if weight_quantizer is not None:
            try:
                scales = [weight_quantizer.scale(part) for part in self._weight_parts()]
            except UserError:
                raise UserError(
                    f"the weight of layer {name} has NaN or infinite values: check the model's file"
                ) from None
            scale = scales[0] if split is None else torch.stack(scales)
        if act_quantizer is not None:
            acts = torch.zeros(intervals, *([] if split is None else [2]), device=self.weight.device)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("act_scale", acts)
        self.register_buffer("act_clipped", None if acts is None else acts.clone())
        self._fake_weight: tuple[ref[Tensor], int, Tensor] | None = None
        self._read_act_scales()

    def _read_act_scales(self) -> None:
        """Keep the scales as numbers: no call waits for a device to tell them."""
        scale = self.act_scale
        self._act_scales = [] if scale is None or scale.is_meta else scale.view(len(scale), -1).tolist()

    def _weight_parts(self) -> tuple[Tensor, ...]:
        weight = self.weight.detach()
        if self.split is None:
            return (weight,)
        return weight.split([self.split, weight.shape[1] - self.split], dim=1)

    def per_part(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `function(weight, scale)` makes of the weight, or of each of its halves, put together."""
        scales = [self.weight_scale] if self.split is None else self.weight_scale
        parts = [function(part, scale) for part, scale in zip(self._weight_parts(), scales, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def integer_weight(self) -> Tensor:
        """The weight's integers, int8, in its shape. Raises ValueError where weights are not quantized."""
        if self.weight_quantizer is None:
            raise ValueError(f"the weights of {self.name} are not quantized")
        return self.per_part(self.weight_quantizer.quantize)

    def fake_weight(self) -> Tensor:
        """The weight as quantized: made at the first call, then kept until the weight changes."""
        weight = self.weight
        # Inference tensors do not count their changes; a tracer's tensors must not outlive it.
        keep = not (weight.is_inference() or torch.compiler.is_compiling())
        if keep and self._fake_weight is not None:
            made_of, version, made = self._fake_weight
            # A tensor of its own, not only a version: `weights_on` puts others in the weight's place.
            if made_of() is weight and version == weight._version:
                return made
        with normal_tensors():
            made = self.per_part(self.weight_quantizer.fake_quantize)
            if weight.dim() == 4 and not weight.is_contiguous():
                made = made.contiguous(memory_format=torch.channels_last)
        if keep:
            self._fake_weight = (ref(weight), weight._version, made)
        return made

    def clear_cache(self) -> None:
        """Free the rounded weight; the next call that needs it makes it again."""
        self._fake_weight = None

    def set_act_scales(self, scales: Tensor, clipped: Tensor) -> None:
        """Take over what a calibration found, in the shape of `act_scale`."""
        self.act_scale.copy_(scales)
        self.act_clipped.copy_(clipped)
        self._read_act_scales()

    def input_scales(self) -> list[float]:
        """The scales of the input in the current interval, one, or two with a split.

        Raises NotCalibratedError, which names the layer.
        """
        return calibrated(self._act_scales, self.state.interval, self.name)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input and the weight to compute with."""
        state, scales = self.state, None
        if self.act_quantizer is not None:
            if state.observer is not None:
                scales = state.observer(self, x)
            elif state.activations:
                scales = self.input_scales()
        if scales is not None:
            x = state.quantize(x, scales, self.act_quantizer.qmax, self.split)
        quantized = state.weights and self.weight_quantizer is not None
        return x, self.fake_weight() if quantized else self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLayer:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        self.clear_cache()
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fake_weight": None}  # a copy makes its own

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.clear_cache()
        self._read_act_scales()


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with simulated quantization; see `QuantLayer`."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._operands(x)
        return self._conv_forward(x, weight, self.bias)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with simulated quantization; see `QuantLayer`."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._operands(x)
        return linear(x, weight, self.bias)


_KINDS: dict[type, type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, Linear: QuantLinear}


def is_quantizable(layer: nn.Module) -> bool:
    """Whether a layer is exactly one of `_KINDS`; subclasses may compute something else."""
    return type(layer) in _KINDS


def quantize_layer(layer: nn.Module, *args: object) -> None:
    """Turn a convolution or linear layer into its quantized kind, in place, with its hooks and names."""
    layer.__class__ = _KINDS[type(layer)]
    layer._start(*args)
