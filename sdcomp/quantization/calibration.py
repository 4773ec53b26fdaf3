"""Calibration: activation ranges from a model's own sampling path."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.quantization.intervals import optimal_starts
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.quantizer import SCALE_METHODS
from sdcomp.quantization.ranges import MagnitudeHistogram

if TYPE_CHECKING:
    import pandas as pd

UPDATE_POLICIES = ("maximum", "momentum")


class CalibrationError(UserError):
    """A calibration cannot give every interval its ranges; the message says which and what to do."""


@dataclass
class _Input:
    """What was seen of one layer's input, or of one half of it."""

    calls: list[tuple[float, float, float]] = field(default_factory=list)  # timestep, range, maximum
    histograms: dict[float, MagnitudeHistogram] = field(
        default_factory=lambda: defaultdict(MagnitudeHistogram)
    )


class Calibrator:
    """Finds a quantized model's activation scales by generating images with it.

    `act_scale_policy`: the clipping range of one call's input, "max" its largest magnitude, "mse" the
    range with the least L_p error, p = 2.4 (default: the model's `act_quant_params`' `scale_method`).
    `act_update_policy`: how the calls of an interval are put together, "maximum" the largest range,
    "momentum" their exponential average, `momentum` of the old one and the rest of the new, started with
    the first call's. `quantized_inputs=True` lets later layers see what the earlier ones, quantized as
    far as they are calibrated, give them; by default all see the full-precision model.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        model: QuantModel,
        *,
        act_scale_policy: str | None = None,
        act_update_policy: str = "maximum",
        momentum: float = 0.9,
        quantized_inputs: bool = False,
    ) -> None:
        if not isinstance(model, QuantModel):
            raise TypeError(f"the second argument must be a QuantModel, not {type(model).__name__}")
        if act_scale_policy is None:
            act_scale_policy = model.act_quantizer.scale_method if model.act_quantizer else "max"
        if act_scale_policy not in SCALE_METHODS:
            raise ValueError(f"act_scale_policy must be 'max' or 'mse', not {act_scale_policy!r}")
        if act_update_policy not in UPDATE_POLICIES:
            raise ValueError(f"act_update_policy must be 'maximum' or 'momentum', not {act_update_policy!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be 0 to below 1, not {momentum}")
        self.sd, self.model = sd, model
        self.act_scale_policy, self.act_update_policy = act_scale_policy, act_update_policy
        self.momentum, self.quantized_inputs = momentum, quantized_inputs
        self._inputs: dict[tuple[str, int], _Input] = {}

    def calibrate(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        sampler: str = "ddpm",
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        image: Tensor | None = None,
        strength: float = 0.8,
        progress: bool = False,
    ) -> QuantModel:
        """Generate from `prompts` and set the scales; returns the model, whose switches stay as they were.

        The arguments are those of `StableDiffusion.generate`. `steps` is by default the model's
        `timesteps`, or 40; `batch_size` the number of prompts, at most the model's own `batch_size`. The same
        arguments give the same scales. A model without quantized activations is returned at once. Rounded
        weights, which only `quantized_inputs` needs, are freed at the end.

        Raises CalibrationError, a ValueError, for an interval that no step fell into; the model then keeps
        the scales that it had. Warns of layers that did not run, and names them.
        """
        model = self.model
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("calibration needs at least one prompt")
        if model.act_quantizer is None:
            return model
        optimal = isinstance(model, TimeStepCalibratedQuantModel) and model.boundaries == "optimal"
        settings = {
            "steps": getattr(model, "timesteps", 40) if steps is None else steps,
            "sampler": sampler,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "batch_size": min(len(prompts), self.sd.batch_size) if batch_size is None else batch_size,
            "strength": strength,
        }
        self._observe_passes(optimal, prompts, image=image, progress=progress, **settings)
        self._finish()
        model.calibration = {
            "act_scale_policy": self.act_scale_policy,
            "act_update_policy": self.act_update_policy,
            "momentum": self.momentum,
            "quantized_inputs": self.quantized_inputs,
            "prompts": len(prompts),
            **settings,
        }
        return model

    @property
    def ranges(self) -> pd.DataFrame:
        """What the last calibration saw, one row for each call of each layer, in order.

        Columns: `layer`, `half` (0, or 1 for the second half of a split input), `timestep` (0 in a model
        that does not know it), `clip` (the range by the policy) and `maximum`, both in activation units.
        """
        import pandas as pd

        rows = [(*key, *call) for key, seen in self._inputs.items() for call in seen.calls]
        return pd.DataFrame(rows, columns=["layer", "half", "timestep", "clip", "maximum"])

    def _observe_passes(self, optimal: bool, prompts: list[str], **settings: object) -> None:
        """Generate once, or twice where the first pass chooses the intervals for the second."""
        model, starts = self.model, self.model.starts
        try:
            self._observe(self.quantized_inputs and not optimal, optimal, prompts, **settings)
            if optimal:
                model.set_starts(self._optimal_starts())
                if self.quantized_inputs:
                    self._observe(True, False, prompts, **settings)
            self._require_all_intervals()
        except BaseException:
            model.set_starts(starts)
            raise

    def _observe(self, quantized: bool, by_timestep: bool, prompts: list[str], **settings: object) -> None:
        """Generate with all inputs observed."""
        model, state = self.model, self.model.state
        self._inputs = {}
        qmax, starts = model.act_quantizer.qmax, model.starts
        last: tuple[Tensor, int | None, int | None, list[tuple[MagnitudeHistogram, float]]] | None = None

        def observer(layer: QuantLayer, x: Tensor) -> list[float] | None:
            nonlocal last
            # Tensors made in inference mode do not count their changes.
            version = None if x.is_inference() else x._version
            seen_before = last is not None and last[0] is x and last[1:3] == (version, layer.split)
            if seen_before and version is not None:
                found = last[3]
            else:
                parts = [x] if layer.split is None else [x[:, : layer.split], x[:, layer.split :]]
                try:
                    histograms = [MagnitudeHistogram.of(part) for part in parts]
                except ValueError as error:
                    raise CalibrationError(f"the input of layer {layer.name} has {error}") from None
                found = [(h, h.clip(self.act_scale_policy, qmax)) for h in histograms]
                last = (x, version, layer.split, found)
            scales = []
            for half, (histogram, clip) in enumerate(found):
                seen = self._inputs.setdefault((layer.name, half), _Input())
                seen.calls.append((state.timestep, clip, histogram.maximum))
                # One histogram an interval, under its first timestep, unless intervals are to be chosen.
                seen.histograms[state.timestep if by_timestep else starts[state.interval]].add(histogram)
                if quantized:
                    scales.append(self._scale(seen, state.interval))
            return scales if quantized else None

        before = state.weights
        state.observer, state.weights = observer, before and quantized
        try:
            self.sd.replace(unet=model).generate(prompts, **settings)
        finally:
            state.observer, state.weights = None, before
            model.clear_cache()

    def _interval(self, timestep: float) -> int:
        return sum(start <= timestep for start in self.model.starts) - 1

    def _clip(self, seen: _Input, interval: int) -> float | None:
        """The range of an input in an interval, by the update policy; None where it was not seen."""
        clips = [clip for timestep, clip, _ in seen.calls if self._interval(timestep) == interval]
        if self.act_update_policy == "maximum":
            return max(clips, default=None)
        average = None
        for clip in clips:
            average = clip if average is None else self.momentum * average + (1 - self.momentum) * clip
        return average

    def _scale(self, seen: _Input, interval: int) -> float:
        """The scale for `_clip`; 0 where the input was not seen, 1 where it was zero throughout."""
        clip = self._clip(seen, interval)
        if clip is None:
            return 0.0
        scale = clip / self.model.act_quantizer.qmax
        return scale if scale > 2.0**-126 else 1.0

    def _optimal_starts(self) -> list[int]:
        timesteps = sorted({call[0] for seen in self._inputs.values() for call in seen.calls})
        k = len(self.model.starts)
        if len(timesteps) < k:
            raise CalibrationError(
                f"{k} intervals need at least {k} different timesteps, and this calibration visited"
                f" {len(timesteps)}: use more steps, a greater strength, or a smaller k"
            )
        inputs = ([seen.histograms[t] for t in timesteps] for seen in self._inputs.values())
        return optimal_starts(inputs, timesteps, k, self.model.act_quantizer.qmax, self.act_scale_policy)

    def _require_all_intervals(self) -> None:
        visited = {self._interval(call[0]) for seen in self._inputs.values() for call in seen.calls}
        for i, (first, last) in enumerate(self.model.intervals):
            if i not in visited:
                raise CalibrationError(
                    f"no calibration step fell into timesteps {first} to {last}, interval {i} of"
                    f" {len(self.model.intervals)}: use more steps, a greater strength, or a smaller k"
                )

    def _finish(self) -> None:
        """Hand each layer its scales, and name those that are short of some."""
        short = []
        intervals = range(len(self.model.intervals))
        for layer in self.model.quantized_layers():
            halves = [self._inputs.get((layer.name, i), _Input()) for i in range(layer.act_scale[0].numel())]
            scales = torch.tensor([[self._scale(seen, i) for seen in halves] for i in intervals])
            clipped = torch.tensor([[self._clipped(seen, i) for seen in halves] for i in intervals])
            shape = layer.act_scale.shape
            layer.set_act_scales(scales.view(shape), clipped.view(shape))
            if (scales == 0).any():
                short.append(layer.name)
        self.model.is_calibrated.fill_(True)
        if short:
            warnings.warn(
                f"{len(short)} layers did not run in every interval while calibrating, and will fail if they"
                f" run later: {', '.join(short)}",
                stacklevel=3,
            )

    def _clipped(self, seen: _Input, interval: int) -> float:
        """The share of an input's values in an interval that lie beyond its range."""
        merged = MagnitudeHistogram()
        for timestep, histogram in seen.histograms.items():
            if self._interval(timestep) == interval:
                merged.add(histogram)
        return merged.beyond(self._clip(seen, interval)) / merged.total if merged.total else 0.0
