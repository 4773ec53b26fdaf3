"""The variants that a study will run, and checks that it can run them, before hours of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sdcomp.errors import UserError
from sdcomp.model.samplers import make_sampler
from sdcomp.quantization import PRESETS, QuantModel
from sdcomp.quantization.intervals import uniform_starts
from sdcomp.study.variants import Variant, pruned

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion


def pruned_variants(
    amounts: float | list[float], structured: bool, mode: str, recover_steps: int = 0
) -> list[Variant]:
    """One variant for each amount, from the published parameters of `02_pruning`."""
    kind = {"mask": "masked channels", "remove": "removed"}[mode] if structured else "unstructured"
    amounts = amounts if isinstance(amounts, list) else [amounts]
    return [pruned(kind, amount, recover_steps=recover_steps) for amount in amounts]


def bit_pairs(weight_bits: int | list[int], act_bits: int | list[int]) -> list[tuple[int, int]]:
    """Bits of weights and of activations, pair by pair; a single number is paired with each of a list."""
    pairs = np.broadcast_arrays(np.atleast_1d(weight_bits), np.atleast_1d(act_bits))
    return [(int(w), int(a)) for w, a in zip(*pairs, strict=True)]


def plain_control(variant: Variant) -> Variant | None:
    """The same variant with ranges that do not depend on the timestep; None where it has such already."""
    plain = variant.recipe.removeprefix("timestep_")
    if plain == variant.recipe or plain not in PRESETS:
        return None
    return replace(variant, recipe=plain, k=0)


def needs_intervals(preset: str) -> bool:
    """Whether a preset has equal timestep intervals; a calibration must then reach each of them."""
    chosen = PRESETS[preset]
    return chosen.timestep_aware and chosen.model.get("boundaries") != "optimal"


def check_calibration(
    sd: StableDiffusion, steps: int, sampler: str, intervals: Sequence[int] = (), filters: Sequence[str] = ()
) -> None:
    """Raise UserError for a calibration of this model that would fail later.

    `intervals` are numbers of equal timestep intervals; a sampling step must fall into each interval.
    `filters` are names of layers; each must match a layer.
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
