"""Observe a quantized model while it runs: histograms of its layers' inputs, and their ranges."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.quantization.input_grids import InputGrid
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.quantizer import UniformQuantizer
from sdcomp.quantization.ranges import Histogram
from sdcomp.quantization.shared_state import LastInput

UPDATE_POLICIES = ("maximum", "momentum", "merged")
MOMENTUM = 0.9
"""The weight of the earlier calls in policy "momentum"."""

Range = tuple[float, float]
"""The lower and the upper end of a clipping range."""


class CalibrationError(UserError):
    """A calibration cannot give every interval its ranges; the message says which and what to do."""


@dataclass
class SeenInput:
    """What was seen of one layer's input, or of one half of it."""

    calls: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Of each call: timestep, lower and upper end of the range, largest magnitude."""
    histograms: dict[float, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """By the first timestep of the interval, or by each timestep."""


class RangeObserver:
    """The observer of `QuantState` while calibrating; see `Calibrator` for the policies.

    `by_timestep` keeps a histogram for each timestep, for intervals that are yet to be chosen. With
    `quantized` the layers compute with inputs that are rounded to the ranges found so far.
    """

    def __init__(
        self,
        model: QuantModel,
        scale_policy: str,
        update_policy: str,
        momentum: float,
        *,
        by_timestep: bool,
        quantized: bool,
    ) -> None:
        self.model, self.scale_policy, self.update_policy = model, scale_policy, update_policy
        self.momentum, self.by_timestep, self.quantized = momentum, by_timestep, quantized
        self.inputs: dict[tuple[str, int], SeenInput] = {}
        self._last = LastInput()

    def __call__(self, layer: QuantLayer, x: Tensor) -> list[InputGrid] | None:
        """Count a layer's input; return the grids to round it to, or None."""
        state, quantizer = self.model.state, layer.act_quantizer
        key = (layer.split, quantizer)
        found = self._last.get(x, key)
        if found is None:
            halves = [x] if layer.split is None else x.tensor_split([layer.split], dim=1)
            try:
                histograms = [Histogram.of(half) for half in halves]
            except ValueError as error:
                raise CalibrationError(f"the input of layer {layer.name} has {error}") from None
            found = [(h, self._range_of_call(h, quantizer)) for h in histograms]
            self._last.keep(x, key, found)
        first = self.model.starts[state.interval]
        for half, (histogram, (low, high)) in enumerate(found):
            seen = self.inputs.setdefault((layer.name, half), SeenInput())
            seen.calls.append((state.timestep, low, high, histogram.maximum))
            seen.histograms[state.timestep if self.by_timestep else first].add(histogram)
        if not self.quantized:
            return None
        return [self._grid(layer, half, state.interval) for half in range(len(found))]

    def result(self, layer: QuantLayer) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return a layer's scales, shares of clipped values, and zero points, in the shape of `act_scale`.

        A scale is 0 where the input was not seen.
        """
        rows = []
        for interval in range(len(self.model.starts)):
            for half in range(layer.act_scale[0].numel()):
                found = self.range(layer, half, interval)
                scale, zero_point = (0.0, 0.0) if found is None else _scale(layer.act_quantizer, found)
                rows.append((scale, self._clipped(layer, half, interval, found), zero_point))
        scales, clipped, zeros = (
            torch.tensor(column).view(layer.act_scale.shape) for column in zip(*rows, strict=True)
        )
        return scales, clipped, None if layer.act_quantizer.symmetric else zeros

    def range(self, layer: QuantLayer, half: int, interval: int) -> Range | None:
        """Return the range of an input in an interval, by the update policy; None where it was not seen."""
        seen = self.inputs.get((layer.name, half), SeenInput())
        ranges = [(low, high) for t, low, high, _ in seen.calls if self.model.interval_of(t) == interval]
        if not ranges:
            return None
        if self.update_policy == "merged":
            quantizer = layer.act_quantizer
            return self._merged(seen, interval).range(
                self.scale_policy, quantizer.qmax, symmetric=quantizer.symmetric, norm=quantizer.norm
            )
        if self.update_policy == "maximum":
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        low, high = ranges[0]
        for new_low, new_high in ranges[1:]:
            low = self.momentum * low + (1 - self.momentum) * new_low
            high = self.momentum * high + (1 - self.momentum) * new_high
        return low, high

    def _range_of_call(self, histogram: Histogram, quantizer: UniformQuantizer) -> Range:
        # The merged histogram is searched once, at the end.
        policy = "max" if self.update_policy == "merged" else self.scale_policy
        return histogram.range(policy, quantizer.qmax, symmetric=quantizer.symmetric, norm=quantizer.norm)

    def _merged(self, seen: SeenInput, interval: int) -> Histogram:
        merged = Histogram()
        for timestep, histogram in seen.histograms.items():
            if self.model.interval_of(timestep) == interval:
                merged.add(histogram)
        return merged

    def _grid(self, layer: QuantLayer, half: int, interval: int) -> InputGrid:
        scale, zero_point = _scale(layer.act_quantizer, self.range(layer, half, interval))
        bounds = layer.act_quantizer.bounds(None if layer.act_quantizer.symmetric else zero_point)
        return InputGrid(scale, *bounds)

    def _clipped(self, layer: QuantLayer, half: int, interval: int, found: Range | None) -> float:
        """The share of an input's values in an interval that lie beyond its range."""
        if found is None:
            return 0.0
        merged = self._merged(self.inputs[layer.name, half], interval)
        return merged.beyond(*found) / merged.total if merged.total else 0.0


def _scale(quantizer: UniformQuantizer, ends: Range) -> tuple[float, float]:
    """The scale and the zero point of a range."""
    # In double precision, as ranges are numbers here; the buffers are float32.
    grid = quantizer.grid_of_range(*(torch.tensor(end, dtype=torch.float64) for end in ends))
    return grid.scale.item(), 0.0 if grid.zero_point is None else grid.zero_point.item()
