"""The recipes that 06_low_bits compares, and results that the paired protocol does not record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from sdcomp.evaluation import PathErrors, Prompts, applicable, bootstrap, estimate
from sdcomp.quantization import PRESETS, Recipe
from sdcomp.quantization.ranges import NORM
from sdcomp.scenes import prompt_accuracy
from sdcomp.study.variants import FP32, Variant, quantized

if TYPE_CHECKING:
    from sdcomp.model import StableDiffusion
    from sdcomp.study.run import Run

_BEST = PRESETS["low_bits"]
LADDER: dict[str, Recipe] = {
    "symmetric": replace(_BEST, inputs={}, model={}, methods=()),
    "affine": replace(_BEST, model={}, methods=()),
    "affine_gptq": replace(_BEST, model={}),
    "low_bits": _BEST,
    "timestep_low_bits": PRESETS["timestep_low_bits"],
}
"""Recipes in order: each has one thing more than the one before it."""


def range_recipe(norm: float, *, symmetric: bool = False, timestep_aware: bool = False) -> tuple[str, Recipe]:
    """Return `low_bits`, or `timestep_low_bits`, with other ranges of its inputs, and a name for it.

    The ranges have the least L_p error with p = `norm`; 0 means all of the values, "max".
    """
    name = "timestep_low_bits" if timestep_aware else "low_bits"
    recipe = PRESETS[name]
    inputs = {**recipe.inputs, "symmetric": symmetric}
    calibrator = dict(recipe.calibrator)
    if symmetric:
        name += " symmetric"
    if norm == 0:
        name += " max"
        calibrator["act_scale_policy"] = "max"
    elif norm != NORM:
        name += f" p{norm:g}"
        inputs["norm"] = norm
    return name, replace(recipe, inputs=inputs, calibrator=calibrator)


def range_variants(
    norms: Sequence[float], k: int, weight_bits: int, act_bits: int
) -> tuple[list[Variant], dict[str, Recipe]]:
    """Return variants that differ only in the ranges of their inputs, and their recipes by name.

    Each norm is taken with affine grids; with symmetric ones; and, for k above 1, in `k` timestep intervals.
    """
    kinds = [{}, {"symmetric": True}, *([{"timestep_aware": True}] if k > 1 else [])]
    recipes = dict(range_recipe(norm, **kind) for norm in norms for kind in kinds)
    variants = [
        quantized(name, weight_bits, act_bits, k if recipe.timestep_aware else 0)
        for name, recipe in recipes.items()
    ]
    return variants, recipes


def record_path(run: Run, variant: Variant, errors: PathErrors, groups: Sequence[object]) -> None:
    """Record the means of a variant's `PathErrors`: candidates for the objective of a calibration."""
    for metric, values in (
        ("step error", errors.step.mean(0)),
        ("gain", 100 * errors.gain.mean(0)),
        ("final latent error", errors.final),
    ):
        unit = "%" if metric == "gain" else ""
        run.record(variant, metric, bootstrap(values, groups=groups), unit=unit, baseline=FP32)


def record_attributes(
    run: Run, variant: Variant, sd: StableDiffusion, images: Tensor, prompts: Prompts
) -> None:
    """Record in how many images each attribute of the scene is missed, where a reader can tell.

    The unit is percent of the images whose scene has the attribute; an object counts by its share.
    """
    if sd.reader is None or prompts.scenes is None:
        return
    found = prompt_accuracy(sd.reader, images, prompts.scenes[: len(images)])
    for attribute, right in found.by_attribute.items():
        values, groups = applicable(right, prompts.groups[: len(images)])
        if len(values):
            missed = estimate(100 * (1 - values), groups)
            run.record(variant, "missed", missed, unit="%", attribute=attribute)
