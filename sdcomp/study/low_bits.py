"""The recipes that 06_low_bits compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdcomp.quantization import PRESETS, Recipe
from sdcomp.quantization.ranges import NORM
from sdcomp.study.variants import Variant, quantized

_BEST = PRESETS["low_bits"]
LADDER: dict[str, Recipe] = {
    "symmetric": replace(_BEST, inputs={}, model={}, methods=()),
    "affine": replace(_BEST, model={}, methods=()),
    "affine_gptq": replace(_BEST, model={}),
    "low_bits": _BEST,
    "timestep_low_bits": PRESETS["timestep_low_bits"],
    "low_rank": PRESETS["low_rank"],
}
"""Recipes in order: each has one thing more than the one before it; the last two, than `low_bits`."""


def range_recipe(
    norm: float, *, symmetric: bool = False, merged: bool = False, timestep_aware: bool = False
) -> tuple[str, Recipe]:
    """Return `low_bits`, or `timestep_low_bits`, with other ranges of its inputs, and a name for it.

    The ranges have the least L_p error with p = `norm`; 0 means all of the values, "max". `merged`: of all
    calls together, instead of the widest of the calls' ranges.
    """
    name = "timestep_low_bits" if timestep_aware else "low_bits"
    recipe = PRESETS[name]
    inputs = {**recipe.inputs, "symmetric": symmetric}
    calibrator = dict(recipe.calibrator)
    if symmetric:
        name += " symmetric"
    if merged:
        name += " merged"
        calibrator["act_update_policy"] = "merged"
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

    Each norm is taken with affine grids; with symmetric ones; for all calls together, unless the range holds
    all values anyway; and, for k above 1, in `k` timestep intervals.
    """
    kinds = [{}, {"symmetric": True}, {"merged": True}, *([{"timestep_aware": True}] if k > 1 else [])]
    pairs = [(norm, kind) for norm in norms for kind in kinds if norm or "merged" not in kind]
    recipes = dict(range_recipe(norm, **kind) for norm, kind in pairs)
    variants = [
        quantized(name, weight_bits, act_bits, k if recipe.timestep_aware else 0)
        for name, recipe in recipes.items()
    ]
    return variants, recipes
