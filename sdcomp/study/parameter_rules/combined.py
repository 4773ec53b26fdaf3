"""The parameters of 04_combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.quantization import PRESETS
from sdcomp.study.parameter_rules.common import (
    AMOUNT,
    BITS,
    CALIBRATION,
    COMMON,
    FOLDER,
    GENERATION,
    INTERVALS,
    JUDGING,
    PRESET,
    PROMPT_SET,
    VARIANTS,
    Rule,
    Study,
    between,
    check_k,
    check_pairs,
    check_recovery,
    first,
    one_of,
)
from sdcomp.study.requests import requested


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(check_recovery(p), check_pairs(p), _check_int8(p), _check_k(p))


def _check_int8(p: Mapping[str, Any]) -> str | None:
    if "int8" in p["backends"] and not PRESETS[p["method"]].activations:
        return f"int8 quantizes activations, and method={p['method']!r} does not: remove int8 from backends"
    return None


def _check_k(p: Mapping[str, Any]) -> str | None:
    in_int8 = any(requested(text).pruning in ("", "removed") for text in p["variants"])
    more = "int8" in p["backends"] and in_int8  # timestep-aware
    return check_k(p, p["k"]) if more or PRESETS[p["method"]].timestep_aware else None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        **JUDGING,
        "prompts": PROMPT_SET,
        "calibration_prompts": PROMPT_SET,
        "n_calibration": CALIBRATION["n_calibration"],
        "calibration_steps": CALIBRATION["calibration_steps"],
        "amount": AMOUNT,
        "method": PRESET,
        "weight_bits": BITS,
        "act_bits": BITS,
        "k": INTERVALS,
        "backends": replace(one_of("fp32", "simulated", "int8"), unique=True),
        "variants": VARIANTS,
        "packed_bits": replace(BITS, may_be_empty=True, unique=True),
        "fewer_steps": replace(GENERATION["steps"], may_be_empty=True, unique=True),
        "budgets": Rule(lambda value: 0 < value <= 1, "shares of the fp16 bytes, above 0 and at most 1"),
        "tolerance": between(0, 100),
        "timing_repeats": between(1, 10_000),
        "save_to": FOLDER,
    },
    _checks,
)
