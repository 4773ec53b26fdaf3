"""Calibration: activation ranges from a model's own sampling path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from sdcomp.model.generate_arguments import as_texts
from sdcomp.model.kinds import require_kind, require_model
from sdcomp.model.pipeline import StableDiffusion
from sdcomp.quantization.intervals import optimal_starts
from sdcomp.quantization.model import TIMESTEPS, QuantModel, TimeStepCalibratedQuantModel
from sdcomp.quantization.observer import MOMENTUM, UPDATE_POLICIES, CalibrationError, RangeObserver
from sdcomp.quantization.quantizer import SCALE_METHODS

if TYPE_CHECKING:
    import pandas as pd


CALIBRATION_SAMPLER = "ddpm"
"""The sampler of a calibration by default."""


def calibration_prompts(prompts: str | Iterable[str]) -> list[str]:
    """Return one prompt or several as a list. Raises TypeError for what is no text, ValueError for none."""
    prompts = as_texts("prompts", prompts)
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    return prompts


class Calibrator:
    """Finds a quantized model's activation ranges while the model runs.

    `act_scale_policy` chooses the range of an input: "max" covers all values, "mse" has the least L_p error.
    By default it is the `scale_method` of the model's `act_quant_params`. `act_update_policy` combines the
    calls of an interval: "maximum" takes the largest range of a call; "momentum" takes the exponential
    average of the calls' ranges, in which a new range has the weight 1 - `momentum`; "merged" takes the range
    of all calls' values together. With `quantized_inputs=True`, later layers see the outputs of earlier
    layers that are quantized to the ranges found so far; by default all layers see the full-precision model.

    `sd` may be None for `observe`, which runs any callable. Raises TypeError for another kind of `sd` or
    `model`, ValueError for an unknown policy and for a momentum out of range.
    """

    def __init__(
        self,
        sd: StableDiffusion | None,
        model: QuantModel,
        *,
        act_scale_policy: str | None = None,
        act_update_policy: str = "maximum",
        momentum: float = MOMENTUM,
        quantized_inputs: bool = False,
    ) -> None:
        if sd is not None:
            require_model(sd)
        require_kind(model, QuantModel, "the second argument must be a QuantModel")
        if act_scale_policy is None:
            act_scale_policy = model.act_quantizer.scale_method if model.act_quantizer else "max"
        if act_scale_policy not in SCALE_METHODS:
            raise ValueError(f"act_scale_policy must be 'max' or 'mse', not {act_scale_policy!r}")
        if act_update_policy not in UPDATE_POLICIES:
            raise ValueError(
                f"act_update_policy must be one of {', '.join(UPDATE_POLICIES)}, not {act_update_policy!r}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be 0 to below 1, not {momentum}")
        self.sd, self.model = sd, model
        self.act_scale_policy, self.act_update_policy = act_scale_policy, act_update_policy
        self.momentum, self.quantized_inputs = momentum, quantized_inputs
        self._seen = self._new_observer()

    def calibrate(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        sampler: str = CALIBRATION_SAMPLER,
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
        `timesteps`, or `TIMESTEPS`; `batch_size` the number of prompts, at most the model's own `batch_size`.
        The same arguments give the same scales. A model without calibrated activations is returned at once.
        Rounded weights, which only `quantized_inputs` needs, are freed at the end.

        Raises CalibrationError, a ValueError, for an interval that no step fell into; the model then keeps
        the scales that it had. Raises what `calibration_prompts` raises. Warns of layers that did not run,
        and names them.
        """
        prompts = calibration_prompts(prompts)
        if self.sd is None:
            raise ValueError("calibrate needs a StableDiffusion; observe calibrates by running any callable")
        settings = {
            "steps": getattr(self.model, "timesteps", TIMESTEPS) if steps is None else steps,
            "sampler": sampler,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "batch_size": min(len(prompts), self.sd.batch_size) if batch_size is None else batch_size,
            "strength": strength,
        }
        sd = self.sd.replace(unet=self.model)
        self.observe(lambda: sd.generate(prompts, image=image, pad=False, progress=progress, **settings))
        if self.model.calibration:
            self.model.calibration |= {"prompts": len(prompts), **settings}
        return self.model

    def observe(self, run: Callable[[], object]) -> QuantModel:
        """Set the scales from what the layers see while `run()` calls the model; returns the model.

        `run` is any callable that calls the model, such as a pipeline of diffusers that holds it. It is
        called once; twice for optimal boundaries with `quantized_inputs`. Raises and warns as `calibrate`.
        """
        model = self.model
        if not any(layer.spec.calibrated for layer in model.quantized_layers()):
            return model
        starts = model.starts
        optimal = isinstance(model, TimeStepCalibratedQuantModel) and model.boundaries == "optimal"
        try:
            self._pass(run, by_timestep=optimal, quantized=self.quantized_inputs and not optimal)
            if optimal:
                model.set_starts(self._optimal_starts())
                if self.quantized_inputs:
                    self._pass(run, by_timestep=False, quantized=True)
            self._require_all_intervals()
        except BaseException:
            model.set_starts(starts)
            raise
        self._finish()
        names = ("act_scale_policy", "act_update_policy", "momentum", "quantized_inputs")
        # Rounded weights stay, and so does the record of the methods that rounded them.
        methods = {name: v for name, v in model.calibration.items() if name == "methods"}
        model.calibration = {name: getattr(self, name) for name in names} | methods
        return model

    @property
    def ranges(self) -> pd.DataFrame:
        """What the last calibration saw, one row for each call of each layer, in order.

        Columns: `layer`, `half` (0, or 1 for the second half of a split input), `timestep` (0 in a model
        that does not know it), `low` and `clip` (the ends of the range of this call by the policy; with
        "merged" all of it) and `maximum`, the largest magnitude; all in activation units.
        """
        import pandas as pd

        rows = [(*key, *call) for key, seen in self._seen.inputs.items() for call in seen.calls]
        return pd.DataFrame(rows, columns=["layer", "half", "timestep", "low", "clip", "maximum"])

    def _new_observer(self, by_timestep: bool = False, quantized: bool = False) -> RangeObserver:
        policies = (self.act_scale_policy, self.act_update_policy, self.momentum)
        return RangeObserver(self.model, *policies, by_timestep=by_timestep, quantized=quantized)

    def _pass(self, run: Callable[[], object], by_timestep: bool, quantized: bool) -> None:
        """Run once with all inputs observed."""
        model, state = self.model, self.model.state
        self._seen = self._new_observer(by_timestep, quantized)
        before = state.weights
        state.observer, state.weights = self._seen, before and quantized
        try:
            run()
        finally:
            state.observer, state.weights = None, before
            model.clear_cache()

    def _optimal_starts(self) -> list[int]:
        inputs = self._seen.inputs
        timesteps = sorted({call[0] for seen in inputs.values() for call in seen.calls})
        k = len(self.model.starts)
        if len(timesteps) < k:
            raise CalibrationError(
                f"{k} intervals need at least {k} different timesteps, and this calibration visited"
                f" {len(timesteps)}: use more steps, a greater strength, or a smaller k"
            )
        layers = {layer.name: layer for layer in self.model.quantized_layers()}
        with_qmax = (
            ([seen.histograms[t] for t in timesteps], 2 ** (layers[name].act_quantizer.n_bits - 1) - 1)
            for (name, _), seen in inputs.items()
        )
        return optimal_starts(with_qmax, timesteps, k, self.act_scale_policy)

    def _require_all_intervals(self) -> None:
        model = self.model
        timesteps = {call[0] for seen in self._seen.inputs.values() for call in seen.calls}
        if not timesteps:
            raise CalibrationError("the calibration did not call the model: let run() call it")
        visited = {model.interval_of(timestep) for timestep in timesteps}
        for i, (first, last) in enumerate(model.intervals):
            if i not in visited:
                raise CalibrationError(
                    f"no calibration step fell into timesteps {first} to {last}, interval {i} of"
                    f" {len(model.intervals)}: use more steps, a greater strength, or a smaller k"
                )

    def _finish(self) -> None:
        """Give each layer its scales, and warn of layers that lack some."""
        short = []
        for layer in self.model.quantized_layers():
            if not layer.spec.calibrated:
                continue
            found = self._seen.result(layer)
            layer.set_act_scales(*found)
            if (found[0] == 0).any():
                short.append(layer.name)
        self.model.is_calibrated.fill_(True)
        if short:
            warnings.warn(
                f"{len(short)} layers did not run in every interval while calibrating, and will fail if they"
                f" run later: {', '.join(short)}",
                stacklevel=4,
            )
