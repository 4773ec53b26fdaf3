"""The parameters of 03_profiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.study.parameter_rules.common import (
    AMOUNT,
    CALIBRATION,
    COMMON,
    GENERATION,
    PROMPT_SET,
    VARIANTS,
    Study,
    between,
    check_openvino,
    check_recovery,
    first,
    one_of,
)


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(check_recovery(p), check_openvino(p))


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        "amounts": replace(AMOUNT, unique=True),
        "variants": VARIANTS,
        "backends": replace(one_of("fp32", "simulated", "int8", "openvino"), unique=True),
        "components": replace(one_of("text encoder", "UNet", "decoder"), unique=True),
        "n_calibration": CALIBRATION["n_calibration"],
        "calibration_prompts": PROMPT_SET,
        "calibration_steps": CALIBRATION["calibration_steps"],
        "prompts": PROMPT_SET,
        "repeats": between(1, 10_000),
    },
    _checks,
)
