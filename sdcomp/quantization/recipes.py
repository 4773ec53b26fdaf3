"""Recipes: what is quantized, how it is calibrated, which methods follow. Presets are named recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sdcomp.quantization.methods import LowRankBranch, Method, SecondOrderRounding
from sdcomp.quantization.model import QuantModel, TimeStepCalibratedQuantModel

_TIMESTEP_ONLY = ("timesteps", "k", "boundaries", "timestep_arg", "train_timesteps")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized, apart from the number of bits.

    `timestep_aware`: whether inputs have their own grid in each timestep interval. `activations`: whether
    inputs are quantized at all. `weights`, `inputs`: arguments of `UniformQuantizer` beside the bits.
    `model`: arguments of the model class, `calibrator`: of the `Calibrator`. `methods` change the calibrated
    layers, in this order; see `sdcomp.quantization.methods`.
    """

    description: str
    timestep_aware: bool = False
    activations: bool = True
    weights: Mapping[str, object] = field(default_factory=dict)
    inputs: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
    calibrator: Mapping[str, str] = field(default_factory=dict)
    methods: Sequence[Method] = ()


_MAX = {"act_scale_policy": "max", "act_update_policy": "maximum"}
# The widest of the calls' ranges: those of merged calls have less error, yet lose more images at 4 bits.
_MSE = {"act_scale_policy": "mse", "act_update_policy": "maximum"}
# Intervals are chosen by the error of merged calls, so the ranges are those of merged calls too.
_MERGED = {"act_scale_policy": "mse", "act_update_policy": "merged"}
_FILTERED = {"quant_filters": "published"}
_OPTIMAL = {"boundaries": "optimal"}
_ENDS = {"overrides": "ends_at_8_bits"}
_MSE_WEIGHTS = {"scale_method": "mse"}
_GROUPS = {"scale_method": "mse", "granularity": "group", "group_size": 64}
_AFFINE = {"symmetric": False}
_GPTQ = (SecondOrderRounding(),)

PRESETS: dict[str, Recipe] = {
    "weights_only": Recipe("weights only", activations=False),
    "max": Recipe("weights and activations, largest magnitude", calibrator=_MAX),
    "max_filtered": Recipe("max, published layers left out", model=_FILTERED, calibrator=_MAX),
    "mse": Recipe("weights and activations, least error", calibrator=_MSE),
    "mse_filtered": Recipe("mse, published layers left out", model=_FILTERED, calibrator=_MSE),
    "timestep_mse": Recipe("mse in each of k timestep intervals", True, calibrator=_MSE),
    "timestep_mse_filtered": Recipe(
        "timestep_mse, published layers left out", True, model=_FILTERED, calibrator=_MSE
    ),
    "timestep_optimal": Recipe("timestep_mse, intervals chosen", True, model=_OPTIMAL, calibrator=_MERGED),
    "timestep_split": Recipe(
        "timestep_optimal, halves of skip concatenations apart",
        True,
        model={**_OPTIMAL, "split_shortcuts": True},
        calibrator=_MERGED,
    ),
    "weights_gptq": Recipe(
        "weights only, second-order rounding, ends at 8 bits",
        activations=False,
        weights=_MSE_WEIGHTS,
        model=_ENDS,
        methods=_GPTQ,
    ),
    "weights_gptq_groups": Recipe(
        "weights only in groups of 64, second-order rounding, ends at 8 bits",
        activations=False,
        weights=_GROUPS,
        model=_ENDS,
        methods=_GPTQ,
    ),
    "low_bits": Recipe(
        "second-order rounding, affine inputs, ends at 8 bits",
        weights=_MSE_WEIGHTS,
        inputs=_AFFINE,
        model=_ENDS,
        calibrator=_MSE,
        methods=_GPTQ,
    ),
    "low_rank": Recipe(
        "low_bits beside low-rank branches in 16 bits",
        weights=_MSE_WEIGHTS,
        inputs=_AFFINE,
        model=_ENDS,
        calibrator=_MSE,
        methods=(LowRankBranch(),),
    ),
    "timestep_low_bits": Recipe(
        "low_bits with affine inputs of their own in each of k timestep intervals",
        True,
        weights=_MSE_WEIGHTS,
        inputs=_AFFINE,
        model=_ENDS,
        calibrator=_MSE,
        methods=_GPTQ,
    ),
}
"""The named recipes. The published ones, down to `timestep_split`, scale weights by the largest magnitude."""


def recipe_of(recipe: str | Recipe) -> Recipe:
    """Return a recipe itself, or the preset of that name. Raises ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in PRESETS:
        raise ValueError(f"method must be one of {', '.join(PRESETS)}, not {recipe!r}")
    return PRESETS[recipe]


def build(
    recipe: str | Recipe, module: nn.Module, weight_bits: int = 8, act_bits: int = 8, **overrides: object
) -> QuantModel:
    """Build the uncalibrated model of a recipe, given by name or itself; its methods are not applied yet.

    `overrides` are arguments of the model class that take the place of the recipe's. Arguments of timestep
    intervals (`timesteps`, `k`, `boundaries`, ...) are for timestep-aware recipes; the others ignore them, so
    that one call serves all. `sdcomp.quantization.quantize` builds, calibrates and applies the methods.

    Raises ValueError for an unknown name, and what the model class raises.
    """
    recipe = recipe_of(recipe)
    params = {
        "weight_quant_params": {**recipe.weights, "n_bits": weight_bits},
        "act_quant_params": {**recipe.inputs, "n_bits": act_bits} if recipe.activations else None,
        **recipe.model,
    }
    for side, bits in (("weight_quant_params", weight_bits), ("act_quant_params", act_bits)):
        if overrides.get(side) is not None:
            overrides[side] = {"n_bits": bits, **overrides[side]}
    params |= overrides
    if recipe.timestep_aware:
        return TimeStepCalibratedQuantModel(module, **params)
    return QuantModel(module, **{name: v for name, v in params.items() if name not in _TIMESTEP_ONLY})
