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
    TOLERANCE,
    VARIANTS,
    Rule,
    Study,
    between,
    check_k,
    check_openvino,
    check_pairs,
    check_recovery,
    first,
    one_of,
)
from sdcomp.study.requests import requested

INTEGER = ("int8", "openvino")
"""The backends that compute in integers."""


def _checks(p: Mapping[str, Any]) -> str | None:
    checks = (check_recovery, check_pairs, _check_activations, _check_k, check_openvino, _check_others)
    return first(*(check(p) for check in checks))


def _check_others(p: Mapping[str, Any]) -> str | None:
    if p["confirm_prompts"] in (p["prompts"], p["calibration_prompts"]):
        return f"confirm_prompts={p['confirm_prompts']!r} is used already: name prompts that choose nothing"
    return None


def _integer(p: Mapping[str, Any]) -> list[str]:
    return [name for name in INTEGER if name in p["backends"]]


def _check_activations(p: Mapping[str, Any]) -> str | None:
    for name in _integer(p):
        if not PRESETS[p["method"]].activations:
            how = f"method={p['method']!r} does not: remove {name} from backends"
            return f"{name} quantizes activations, and {how}"
    return None


def _check_k(p: Mapping[str, Any]) -> str | None:
    in_integers = any(requested(text).pruning in ("", "removed") for text in p["variants"])
    more = _integer(p) and in_integers  # timestep-aware
    return check_k(p, p["k"]) if more or PRESETS[p["method"]].timestep_aware else None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        **JUDGING,
        "prompts": PROMPT_SET,
        "calibration_prompts": PROMPT_SET,
        "confirm_prompts": Rule(
            lambda name: not name or PROMPT_SET.takes(name), f"{PROMPT_SET.words}; or empty"
        ),
        "n_calibration": CALIBRATION["n_calibration"],
        "calibration_steps": CALIBRATION["calibration_steps"],
        "amount": AMOUNT,
        "method": PRESET,
        "weight_bits": BITS,
        "act_bits": BITS,
        "k": INTERVALS,
        "backends": replace(one_of("simulated", *INTEGER), may_be_empty=True, unique=True),
        "variants": VARIANTS,
        "packed_bits": replace(BITS, may_be_empty=True, unique=True),
        "fewer_steps": replace(GENERATION["steps"], may_be_empty=True, unique=True),
        "budgets": Rule(lambda value: 0 < value <= 1, "shares of the fp16 bytes, above 0 and at most 1"),
        "tolerance": TOLERANCE,
        "timing_repeats": between(1, 10_000),
        "save_to": FOLDER,
    },
    _checks,
)
