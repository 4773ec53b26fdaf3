"""What studies of quantization ask before hours of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sdcomp.errors import UserError
from sdcomp.model.samplers import make_sampler
from sdcomp.quantization import PRESETS, QuantModel
from sdcomp.quantization.intervals import uniform_starts

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion


def bit_pairs(weight_bits: int | list[int], act_bits: int | list[int]) -> list[tuple[int, int]]:
    """Bits of weights and of activations, pair by pair; a single number goes along with each of a list."""
    pairs = np.broadcast_arrays(np.atleast_1d(weight_bits), np.atleast_1d(act_bits))
    return [(int(w), int(a)) for w, a in zip(*pairs, strict=True)]


def needs_intervals(preset: str) -> bool:
    """Whether a preset has equal timestep intervals, each of which has to be met in calibration."""
    chosen = PRESETS[preset]
    return chosen.timestep_aware and chosen.model.get("boundaries") != "optimal"


def check_calibration(
    sd: StableDiffusion, steps: int, sampler: str, intervals: Sequence[int] = (), filters: Sequence[str] = ()
) -> None:
    """Raise UserError for what a calibration of this model would fail on, or a name that is no layer's.

    `intervals` are numbers of equal timestep intervals; one into which no sampling step falls could not be
    calibrated. `filters` leave out layers; each has to match one.
    """
    if filters:
        QuantModel(sd.unet, quant_filters=list(filters))
    try:
        visited = make_sampler(sampler, sd.schedule, steps).timesteps
    except ValueError as error:
        raise UserError(f"calibration_steps={steps} cannot be run with {sampler}: {error}") from None
    for k in intervals:
        starts = uniform_starts(k, sd.config.schedule.train_timesteps)
        met = {sum(start <= timestep for start in starts) for timestep in visited}
        if len(met) < k:
            raise UserError(
                f"{steps} calibration steps of {sampler} fall into {len(met)} of k={k} timestep intervals:"
                " take fewer intervals, or another number of calibration_steps"
            )
