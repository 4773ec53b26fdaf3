"""The parameters of 07_conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.quantization import PRESETS
from sdcomp.study.conditions import POLICIES, Condition, condition
from sdcomp.study.parameter_rules.common import (
    BITS,
    CALIBRATION,
    CLIP,
    COMMON,
    COUNT,
    GENERATION,
    INTERVALS,
    PROMPT_SET,
    VARIANTS,
    Rule,
    Study,
    between,
    check_recovery,
    first,
    one_of,
)

_ANY = Condition("ddim", 1, 1.0)
"""What a condition takes for what its text does not name."""


def _is_condition(text: str) -> bool:
    asked = condition(text, _ANY)
    return all(GENERATION[name].takes(value) for name, value in asked.settings.items())


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(_check_k(p), check_recovery({**p, "variants": p["pruned"]}))


def _check_k(p: Mapping[str, Any]) -> str | None:
    if PRESETS[p["preset"]].timestep_aware and p["k"] > p["steps"]:
        return f"k must be at most steps, {p['steps']}, not {p['k']}: calibration takes as many steps"
    return None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        "preset": one_of(*(name for name, recipe in PRESETS.items() if recipe.activations)),
        "bits": replace(BITS, unique=True),
        "k": INTERVALS,
        "pruned": replace(VARIANTS, may_be_empty=False),
        "calibration_sizes": replace(COUNT, unique=True),
        "draws": between(1, 100),
        "calibration_samplers": replace(CALIBRATION["calibration_sampler"], may_be_empty=True, unique=True),
        "policies": replace(one_of(*POLICIES), may_be_empty=True, unique=True),
        "conditions": Rule(
            _is_condition,
            "conditions, such as 'ddpm', '10 steps' or 'dpmpp_2m 10 steps guidance 2'",
            may_be_empty=True,
            unique=True,
        ),
        "calibration_prompts": PROMPT_SET,
        "prompts": PROMPT_SET,
        "clip_model": CLIP,
    },
    _checks,
)
