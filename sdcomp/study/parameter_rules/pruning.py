"""The parameters of 02_pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcomp.study.parameter_rules.common import (
    AMOUNT,
    AMOUNTS,
    COMMON,
    COUNT,
    FREE,
    GENERATION,
    JUDGING,
    PROMPT_SET,
    VARIANTS,
    Study,
    between,
    check_recovery,
    first,
    one_of,
)


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(_check_removal(p), check_recovery(p), _check_sensitivity(p))


def _check_removal(p: Mapping[str, Any]) -> str | None:
    if p["mode"] == "remove" and not p["structured"]:
        return "mode='remove' removes channels: set structured to true as well"
    return None


def _check_sensitivity(p: Mapping[str, Any]) -> str | None:
    if p["sensitivity_amounts"] and not p["noise_images"]:
        return "sensitivity_amounts need noise predictions: set noise_images above 0"
    return None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        **JUDGING,
        "prompts": PROMPT_SET,
        "calibration_prompts": PROMPT_SET,
        "amount": AMOUNT,
        "structured": FREE,
        "mode": one_of("mask", "remove"),
        "recover_steps": between(0, 10_000_000),
        "variants": VARIANTS,
        "n_calibration": COUNT,
        "sensitivity_amounts": AMOUNTS,
        "timing_repeats": between(1, 10_000),
    },
    _checks,
)
