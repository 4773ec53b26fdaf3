"""The parameters of 06_low_bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.quantization import PRESETS
from sdcomp.study.low_bits import LADDER
from sdcomp.study.parameter_rules.common import (
    BITS,
    CLIP,
    COMMON,
    COUNT,
    GENERATION,
    INTERVALS,
    PRESET,
    PROMPT_SET,
    Rule,
    Study,
    between,
    first,
    one_of,
)


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(_check_bits(p), _check_k(p))


def _check_bits(p: Mapping[str, Any]) -> str | None:
    if p["act_bits"][-1] == 32:
        return "the last of act_bits is that of the ladder, which quantizes activations: put 32 before it"
    alone = [name for name in p["methods"] if not PRESETS[name].activations]
    if alone and 32 not in p["act_bits"]:
        return f"{alone[0]} leaves activations in full precision: add 32 to act_bits"
    return None


def _check_k(p: Mapping[str, Any]) -> str | None:
    named = [*(PRESETS[name] for name in p["methods"]), *(LADDER[name] for name in p["ladder"])]
    aware = p["norms"] or any(recipe.timestep_aware for recipe in named)
    if aware and p["k"] > p["steps"]:
        return f"k must be at most steps, {p['steps']}, not {p['k']}: calibration takes as many steps"
    return None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        "methods": replace(PRESET, unique=True),
        "weight_bits": replace(BITS, unique=True),
        "act_bits": Rule(lambda value: value == 32 or 2 <= value <= 8, "between 2 and 8, or 32", unique=True),
        "ladder": replace(one_of(*LADDER), may_be_empty=True, unique=True),
        "k": INTERVALS,
        "norms": Rule(
            lambda value: value == 0 or 1 <= value <= 16,
            "exponents between 1 and 16, or 0 for max",
            may_be_empty=True,
            unique=True,
        ),
        "sensitivity_layers": between(0, 10_000),
        "n_calibration": COUNT,
        "calibration_prompts": PROMPT_SET,
        "prompts": PROMPT_SET,
        "clip_model": CLIP,
    },
    _checks,
)
