"""The parameters of 02_pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdcomp.study.rules import common
from sdcomp.study.rules.common import (
    AMOUNTS,
    COMMON,
    GENERATION,
    JUDGING,
    Study,
    check_pruning,
    first,
    one_of,
)


def _checks(p: Mapping[str, Any]) -> str | None:
    return first(check_pruning(p), _check_scope(p), _check_sensitivity(p))


def _check_scope(p: Mapping[str, Any]) -> str | None:
    if p["scope"] == "global" and p["structured"]:
        return "scope='global' needs single weights: set structured to false, or scope to layer"
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
        **common.PRUNING,
        "scope": one_of("layer", "global"),
        "criterion": one_of("l1", "l2", ""),
        "mask_amounts": AMOUNTS,
        "sensitivity_amounts": AMOUNTS,
    },
    _checks,
)
