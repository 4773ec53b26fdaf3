"""The parameters of 04_combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sdcomp.quantization import PRESETS
from sdcomp.study.rules import common
from sdcomp.study.rules.common import (
    AMOUNTS,
    BITS,
    CALIBRATION,
    COMMON,
    FOLDER,
    FREE,
    GENERATION,
    INTERVALS,
    JUDGING,
    PRESET,
    Rule,
    Study,
    between,
    check_k,
    check_pairs,
    check_pruning,
    first,
    one_of,
)


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(check_pruning(p), check_pairs(p), _check_int8(p), _check_k(p))


def _check_int8(p: Mapping[str, Any]) -> str | None:
    if "int8" in p["backends"] and not PRESETS[p["method"]].activations:
        return f"int8 quantizes activations, and method={p['method']!r} does not: remove int8 from backends"
    return None


def _check_k(p: Mapping[str, Any]) -> str | None:
    removed = p["remove_amounts"] or p["recovered_amounts"]  # timestep-aware
    return check_k(p, p["k"]) if removed or PRESETS[p["method"]].timestep_aware else None


STUDY = Study(
    {
        **COMMON,
        **GENERATION,
        **JUDGING,
        **CALIBRATION,
        **common.PRUNING,
        "method": PRESET,
        "weight_bits": BITS,
        "act_bits": BITS,
        "k": INTERVALS,
        "backends": replace(one_of("fp32", "simulated", "int8"), unique=True),
        "weights_only_amounts": AMOUNTS,
        "weights_only_bits": BITS,
        "order_ablation": FREE,
        "budgets": Rule(lambda value: 0 < value <= 1, "shares of the fp32 bytes, above 0 and at most 1"),
        "tolerance": between(0, 100),
        "save_to": FOLDER,
    },
    _checks,
)
