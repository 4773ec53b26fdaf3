"""What a run may say in words: the verdicts that its number of images allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdcomp.study.claims import UNKNOWN, VERDICTS, not_worse
from sdcomp.study.results import Row, with_interval
from sdcomp.study.variants import FP32, Variant

ENOUGH = 64
"""Fewer images than this give no verdict."""
TOLERANCES = {"prompt accuracy difference": 5.0, "CLIP score difference": 1.0}
"""The loss that counts as none, in points of each score. CLIP scores of any two images lie close together."""
LITTLE = 0.4
"""The smallest and the fastest may lose this share of the tolerance; their intervals may reach all of it."""


def answer(differences: Sequence[Row], tolerance: float | None = None) -> str:
    """Sentences about paired differences to fp32: how sure they are, and who loses at most `tolerance`.

    `differences` are rows of one metric with intervals, one for each variant; empty where all have failed.
    `tolerance` is by default that of the metric in `TOLERANCES`.
    """
    if not differences:
        return "No variant gave images, so this run has no answer."
    first = differences[0]
    tolerance = _tolerance(differences, tolerance)
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
            told = f"{verdict} at this n" if verdict == UNKNOWN else verdict
            lines.append(f"'Loses at most {tolerance:g}' {told}:")
            lines += [f"- {_shown(row)}" for row in found]
    return "\n".join(lines)


def smallest_file(
    differences: Sequence[Row],
    megabytes: Mapping[Variant, float],
    half: float,
    tolerance: float | None = None,
) -> str:
    """A sentence about the smallest file that loses little.

    Little is at most `LITTLE` of the `tolerance`; the interval may reach down to all of it.
    `differences` are rows as for `answer`, `megabytes` the real files of some of the variants, and `half` is
    the file in fp16.
    """
    if few := too_few(differences, "file is the smallest"):
        return few
    of = "Of 1 file" if len(megabytes) == 1 else f"Of {len(megabytes)} files"
    little = _limits(differences, tolerance)
    found = cheapest(differences, megabytes, tolerance)
    if found is None or megabytes[found["variant"]] >= half:
        return f"{of}, none below the {half:.1f} MB of fp16 is within the limits: {little}."
    size = megabytes[found["variant"]]
    return (
        f"{of}, the smallest that loses {little} has {size:.2f} MB, {100 * size / half:.0f} % of fp16"
        f" ({_shown(found)})."
    )


def fewest_bits(methods: Mapping[str, Sequence[Row]], tolerance: float | None = None) -> str:
    """A sentence about the fewest bits of weights at which each method loses little, see `smallest_file`.

    `methods` has the rows of each. All rows of the method with as many bits or more must lose little too.
    """
    rows = [row for found in methods.values() for row in found]
    if few := too_few(rows, "bits are enough"):
        return few
    said = []
    for method, found in methods.items():
        limit = _tolerance(found, tolerance)
        lost = max((row["variant"].weight_bits for row in found if not _little(row, limit)), default=0)
        kept = (row["variant"].weight_bits for row in found if row["variant"].weight_bits > lost)
        # A title breaks its lines between methods only.
        said.append(f"{method}\N{NO-BREAK SPACE}{min(kept, default='none')}")
    little = _limits(rows, tolerance)
    return f"The fewest bits that lose {little}, {rows[0]['n']:g} images: {', '.join(said)}."


def fastest(
    differences: Sequence[Row], seconds: Mapping[Variant, float], tolerance: float | None = None
) -> str:
    """Sentences about the fastest execution that loses little, and the control: fewer steps of fp32 alone.

    `seconds` are those of the UNet for an image, in fp32 and in all variants that really run; "little" is as
    for `smallest_file`.
    """
    if few := too_few(differences, "execution is the fastest"):
        return few
    alone = [row for row in differences if row["variant"] == Variant(steps=row["variant"].steps)]
    little = _limits(differences, tolerance)
    lines = []
    for of, rows in (("Of all executions", differences), ("Of fewer steps of fp32 alone", alone)):
        found = cheapest(rows, seconds, tolerance)
        if found is None or seconds[found["variant"]] >= seconds[FP32]:
            lines.append(f"{of}, none that is faster than fp32 is within the limits: {little}.")
            continue
        time = seconds[found["variant"]]
        lines.append(
            f"{of}, the fastest that loses {little} takes {time:.3f} s of UNet time an image:"
            f" {seconds[FP32] / time:.1f} times as fast as the UNet in fp32 ({_shown(found)})."
        )
    return "\n".join(lines)


def added_losses(differences: Sequence[Row], interactions: Sequence[Row] = ()) -> str:
    """In how many cases a quantized UNet is worse than the same pruned UNet before quantization.

    `differences` are rows as for `answer`. `interactions` are their differences to what the same quantization
    costs the whole UNet.
    """
    if few := too_few(differences, "quantization costs a pruned UNet anything"):
        return few
    worse = [row for row in differences if row["ci_high"] < 0]
    score = differences[0]["metric"].removesuffix(" difference")
    said = f"Quantizing a pruned UNet is shown to cost {score} in {len(worse)} of {len(differences)} cases"
    if not interactions:
        return said
    more = sum(row["ci_high"] < 0 for row in interactions)
    less = sum(row["ci_low"] > 0 for row in interactions)
    return f"{said}; more than it costs the whole UNet in {more}, less in {less}"


def repeated(differences: Sequence[Row], tolerance: float | None = None) -> str:
    """A sentence about chosen variants on prompts that did not choose them; rows are as for `answer`."""
    if few := too_few(differences, "losses are the same on other prompts"):
        return few
    n, name = differences[0]["n"], differences[0]["about"]["prompts"]
    tolerance = _tolerance(differences, tolerance)
    shown = "; ".join(
        f"{_shown(row)}, {'within' if _little(row, tolerance) else 'outside'} these limits"
        for row in differences
    )
    return f"On {n:g} other prompts ('{name}'), on which nothing was chosen: {shown}."


def _little(row: Row, tolerance: float) -> bool:
    """Whether a difference is at most `LITTLE` of the tolerance, and its worse end at most all of it."""
    return row["value"] >= -LITTLE * tolerance and row["ci_low"] >= -tolerance


def cheapest(
    differences: Sequence[Row], costs: Mapping[Variant, float], tolerance: float | None = None
) -> Row | None:
    """The row of the least cost among the variants that are shown to lose little, see `smallest_file`."""
    tolerance = _tolerance(differences, tolerance)
    little = [row for row in differences if row["variant"] in costs and _little(row, tolerance)]
    return min(little, key=lambda row: costs[row["variant"]], default=None)


def too_few(differences: Sequence[Row], what: str) -> str:
    """Why rows do not tell which `what`, such as "file is the smallest"; empty where they do."""
    if not differences:
        return answer(differences)
    n = differences[0]["n"]
    return f"{n:g} images do not tell which {what}: it takes {ENOUGH}." if n < ENOUGH else ""


def tolerance_of(score: str, tolerance: float | str | None = None) -> float:
    """The `tolerance`, or that of a score in `TOLERANCES` where it is None or empty."""
    return TOLERANCES[f"{score} difference"] if tolerance in (None, "") else float(tolerance)


def _tolerance(differences: Sequence[Row], tolerance: float | None) -> float:
    """The tolerance, by default that of the rows' metric."""
    if not differences:
        return 0.0
    return tolerance_of(differences[0]["metric"].removesuffix(" difference"), tolerance)


def _limits(differences: Sequence[Row], tolerance: float | None) -> str:
    score = differences[0]["metric"].removesuffix(" difference")
    tolerance = _tolerance(differences, tolerance)
    return f"at most {LITTLE * tolerance:g} points of {score} (interval not below -{tolerance:g})"


def _shown(row: Row) -> str:
    return f"{row['label']}: {with_interval(row)}"
