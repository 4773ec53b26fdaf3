"""The parameters of 01_quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.quantization import PRESETS
from sdcomp.study.parameter_rules.common import (
    BITS,
    CALIBRATION,
    COMMON,
    FREE,
    GENERATION,
    INTERVALS,
    JUDGING,
    PRESET,
    PROMPT_SET,
    Rule,
    Study,
    check_k,
    check_pairs,
    first,
    one_of,
    there,
)


def _is_image(path: str) -> bool:
    return not path or ((found := there(path)) is not None and found.is_file())


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(check_pairs(p), _check_sweep(p), _check_activations(p), _check_k(p))


def _check_sweep(p: Mapping[str, Any]) -> str | None:
    if bool(p["sweep_methods"]) == bool(p["sweep_bits"]):
        return None
    given, missing = (
        ("sweep_methods", "sweep_bits") if p["sweep_methods"] else ("sweep_bits", "sweep_methods")
    )
    return f"{given} needs {missing}: give both or neither"


def _check_activations(p: Mapping[str, Any]) -> str | None:
    if p["quantize_activations"] and not p["calibrate"]:
        return "activations have no ranges without calibration: set quantize_activations to false too"
    return None


def _check_k(p: Mapping[str, Any]) -> str | None:
    aware = any(PRESETS[method].timestep_aware for method in [*p["methods"], *p["sweep_methods"]])
    return first(check_k(p, p["k"]) if aware else None, check_k(p, *p["sweep_k"], name="sweep_k"))


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        **JUDGING,
        **CALIBRATION,
        "methods": replace(PRESET, unique=True),
        "weight_bits": BITS,
        "act_bits": BITS,
        "k": INTERVALS,
        "sweep_methods": replace(PRESET, unique=True),
        "sweep_bits": BITS,
        "sweep_k": INTERVALS,
        "act_scale_policy": one_of("max", "mse", ""),
        "act_update_policy": one_of("maximum", "momentum", ""),
        "weight_scale_policy": one_of("max", "mse", ""),
        # `check_calibration` asks the model whether such a layer exists.
        "quant_filters": Rule(
            lambda value: value.strip() != "", "names of layers, such as 'out' or '*.to_v'"
        ),
        "quantize_weights": FREE,
        "quantize_activations": FREE,
        "calibrate": FREE,
        "calibration_prompts": PROMPT_SET,
        "prompts": PROMPT_SET,
        "negative_prompt": FREE,
        "image": Rule(_is_image, "an existing image file, or empty"),
        "strength": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    },
    _checks,
)
