"""What a run may say in words: the verdicts that its number of images allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdcomp.study.claims import HOLDS, VERDICTS, not_worse
from sdcomp.study.results import Row
from sdcomp.study.variants import FP32, Variant

ENOUGH = 64
"""Fewer images than this give no verdict."""
LITTLE = 2.0
"""The largest loss, in points, that a variant may have to be called the smallest or the fastest."""


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
        if np.isfinite(reach)
        else f"{first['n']:g} images a variant are too few for intervals of the {first['metric']}."
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


def smallest_file(
    differences: Sequence[Row], megabytes: Mapping[Variant, float], half: float, tolerance: float = 5.0
) -> str:
    """A sentence about the smallest file that loses little.

    Little is at most `LITTLE` points, and at most `tolerance` at the worse end of the interval.
    `differences` are rows as for `answer`, `megabytes` the real files of some of the variants, and `half` is
    the file in fp16.
    """
    if too_few := _too_few(differences, "file is the smallest"):
        return too_few
    found = _cheapest(differences, megabytes, tolerance)
    if found is None or megabytes[found["variant"]] >= half:
        return f"No file below the {half:.1f} MB of fp16 is shown to have {_limits(tolerance)}."
    size = megabytes[found["variant"]]
    return (
        f"The smallest of {len(megabytes)} files with {_limits(tolerance)}: {size:.2f} MB,"
        f" {size / half:.0%} of fp16 ({_shown(found)})."
    )


def fewest_bits(methods: Mapping[str, Sequence[Row]], tolerance: float = 5.0) -> str:
    """A sentence about the fewest bits of weights at which each method loses little, see `smallest_file`.

    `methods` has the rows of each.
    """
    rows = [row for found in methods.values() for row in found]
    if too_few := _too_few(rows, "bits are enough"):
        return too_few
    said = []
    for method, found in methods.items():
        bits = {row["variant"]: row["variant"].weight_bits for row in found}
        fewest = _cheapest(found, bits, tolerance)
        # A title breaks its lines between methods only.
        said.append(f"{method}\N{NO-BREAK SPACE}{'none' if fewest is None else bits[fewest['variant']]}")
    return f"The fewest bits with {_limits(tolerance)}, {rows[0]['n']:g} images: {', '.join(said)}."


def bits_kept(differences: Sequence[Row], tolerance: float = 5.0) -> str:
    """A title for one method: the fewest bits down to which it is shown to lose at most `tolerance`.

    `differences` are rows as for `answer`, over a grid of bits of weights and of activations. All pairs with
    as many bits or more must hold too. The fewest bits are the smallest product of the two.
    """
    if too_few := _too_few(differences, "bits are enough"):
        return too_few
    holds = {}
    for row in differences:
        verdict = not_worse(row["ci_low"], row["ci_high"], tolerance)
        holds[row["variant"].weight_bits, row["variant"].act_bits] = verdict == HOLDS
    kept = [(w, a) for w, a in holds if all(held for (v, b), held in holds.items() if v >= w and b >= a)]
    method, score = differences[0]["variant"].recipe, differences[0]["metric"].removesuffix(" difference")
    if not kept:
        return f"{method}: no bits are shown to keep {score}"
    w, a = min(kept, key=lambda pair: pair[0] * pair[1])
    inputs = "activations in full" if a == 32 else f"{a} of activations"
    return f"{method}: {score} holds down to {w} bits of weights and {inputs}"


def about_equal(correlations: Mapping[str, float], margin: float = 0.05) -> str:
    """A title about measures by their rank correlations; those within `margin` of the best are equal."""
    ranked = sorted(correlations.items(), key=lambda item: -item[1])
    near = [(name, value) for name, value in ranked if value >= ranked[0][1] - margin]
    rest = ", ".join(f"{name} {value:.2f}" for name, value in ranked[len(near) :])
    said = f"{near[0][0]} ranks the variants best ({near[0][1]:.2f})"
    if len(near) > 1:
        ends = f"{near[-1][1]:.2f} to {near[0][1]:.2f}"
        said = f"{len(near)} of {len(ranked)} errors rank the variants about equally ({ends})"
    return f"{said}; {rest}" if rest else said


def late_errors(paths: Mapping[str, Sequence[Row]]) -> str:
    """A title about where variants make their largest error; each has its rows from first step to last."""
    late = [rows for rows in paths.values() if max(row["value"] for row in rows) == rows[-1]["value"]]
    if not paths or len(late) < len(paths):
        return f"{len(late)} of {len(paths)} variants make their largest error in the last step"
    times = sorted(rows[-1]["value"] / rows[0]["value"] for rows in late)
    return (
        "Every variant makes its largest error in the last step:"
        f" {times[0]:.2g} to {times[-1]:.2g} times that of the first"
    )


def missed_more(missed: Mapping[str, Sequence[Row]], baseline: Sequence[Row]) -> str:
    """A title about attributes that variants miss more often than the baseline.

    Two intervals that do not overlap show it. The rows of a variant and of the baseline have one order.
    """
    counts = {
        name: sum(row["ci_low"] > own["ci_high"] for row, own in zip(rows, baseline, strict=True))
        for name, rows in missed.items()
    }
    said = [f"{count} of {len(baseline)} attributes by {name}" for name, count in counts.items() if count]
    if not said:
        return "No variant is shown to miss an attribute more often than fp32"
    others = ["none by the others"] if 0 in counts.values() else []
    return f"Shown to be missed more often than by fp32: {', '.join(said + others)}"


def fastest(differences: Sequence[Row], seconds: Mapping[Variant, float], tolerance: float = 5.0) -> str:
    """Sentences about the fastest execution that loses little, and the control: fewer steps of fp32 alone.

    `seconds` are those of the UNet for an image, in fp32 and in all variants that really run; "little" is as
    for `smallest_file`.
    """
    if too_few := _too_few(differences, "execution is the fastest"):
        return too_few
    alone = [row for row in differences if row["variant"] == Variant(steps=row["variant"].steps)]
    lines = []
    for who, rows in (("The fastest execution", differences), ("Fewer steps of fp32 alone", alone)):
        found = _cheapest(rows, seconds, tolerance)
        if found is None or seconds[found["variant"]] >= seconds[FP32]:
            lines.append(f"{who}: none that is faster than fp32 is shown to have {_limits(tolerance)}.")
            continue
        time = seconds[found["variant"]]
        lines.append(
            f"{who}, with {_limits(tolerance)}: {time:.3f} s of UNet time an image,"
            f" {seconds[FP32] / time:.1f} times as fast as the UNet in fp32 ({_shown(found)})."
        )
    return "\n".join(lines)


def _too_few(differences: Sequence[Row], what: str) -> str:
    """Why nothing can be said, if so."""
    if not differences:
        return answer(differences)
    n = differences[0]["n"]
    return f"{n:g} images do not tell which {what}: it takes {ENOUGH}." if n < ENOUGH else ""


def _cheapest(differences: Sequence[Row], costs: Mapping[Variant, float], tolerance: float) -> Row | None:
    """The row of the least cost among the variants that are shown to lose little."""
    little = [
        row
        for row in differences
        if row["variant"] in costs and row["value"] >= -LITTLE and row["ci_low"] >= -tolerance
    ]
    return min(little, key=lambda row: costs[row["variant"]], default=None)


def _limits(tolerance: float) -> str:
    return f"at most {LITTLE:g} points lost ({tolerance:g} at the worse end of its interval)"


def _shown(row: Row) -> str:
    ends = f" [{row['ci_low']:.1f}, {row['ci_high']:.1f}]" if np.isfinite(row["ci_low"]) else ""
    return f"{row['label']}: {row['value']:.1f}{ends}"
