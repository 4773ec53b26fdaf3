"""What a run may say in words: the verdicts that its number of images allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdcomp.study.claims import VERDICTS, not_worse
from sdcomp.study.results import Row

ENOUGH = 64
"""Fewer images than this give no verdict."""


def answer(differences: Sequence[Row], tolerance: float = 5.0) -> str:
    """Sentences about paired differences to fp32: how sure they are, and who loses at most `tolerance`.

    `differences` are rows of one metric with intervals, one for each variant; empty where all have failed.
    """
    if not differences:
        return "No variant gave images, so this run has no answer."
    first = differences[0]
    reach = float(np.median([(row["ci_high"] - row["ci_low"]) / 2 for row in differences]))
    lines = [
        f"{first['n']:g} images a variant. The intervals of the {first['metric']} reach {reach:.1f}"
        f" ({first['unit']}) to each side (median); smaller differences cannot be told."
    ]
    if first["n"] < ENOUGH:
        lines.append(f"Fewer than {ENOUGH} images give no verdict. Differences to fp32:")
        return "\n".join(lines + [f"- {_shown(row)}" for row in differences])
    for verdict in VERDICTS:
        found = [r for r in differences if not_worse(r["ci_low"], r["ci_high"], tolerance) == verdict]
        if found:
            lines.append(f"'Loses at most {tolerance:g}' {verdict}:")
            lines += [f"- {_shown(row)}" for row in found]
    return "\n".join(lines)


def _shown(row: Row) -> str:
    return f"{row['label']}: {row['value']:.1f} [{row['ci_low']:.1f}, {row['ci_high']:.1f}]"
