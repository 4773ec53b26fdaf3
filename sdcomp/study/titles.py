"""Titles of figures. They claim no more than the rows of a run show."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import isnan

from sdcomp.evaluation.timing import ENOUGH_TIMES
from sdcomp.study.answers import tolerance_of, too_few
from sdcomp.study.claims import HOLDS, not_worse
from sdcomp.study.results import Row, with_interval
from sdcomp.study.variants import Variant


def plain(variant: Variant, amount: bool = True) -> str:
    """The name of a variant in figures with one recipe, such as "removed 60 % by second order, int8".

    Without `amount` it is the same for all amounts. The space before "%" does not break.
    """
    pruning = variant.unquantized.describe(amount) if variant.pruning else ""
    pruning = pruning.replace(" global by second_order", " by second order")
    pruning = pruning.replace(" by second_order", " by second order in each layer").replace(" %", "\u00a0%")
    bits = f"W{variant.weight_bits}A{variant.act_bits} " if variant.execution == "simulated" else ""
    execution = f"{bits}{variant.execution}" if variant.recipe else ""
    return ", ".join(part for part in (pruning, execution) if part) or "fp32"


def saves_less(times: Sequence[Row], arithmetic: Mapping[Variant, float]) -> str:
    """A title about removals whose time relative to fp32 is shown to be above the share of arithmetic left.

    Then the time of the last amount of every way to prune, where it runs in fp32. Lines break between these.
    Times that were measured fewer than `ENOUGH_TIMES` times show nothing.
    """
    told = [row for row in times if row["variant"] in arithmetic and row["n"] >= ENOUGH_TIMES]
    less = [row["ci_low"] > arithmetic[row["variant"]] for row in told]
    last = {plain(row["variant"], amount=False): row for row in times if row["variant"].pruning}
    said = [
        f"{plain(row['variant'])} {row['value']:.2f}" for row in last.values() if not row["variant"].recipe
    ]
    lines = textwrap.wrap("Calls take: " + ", ".join(words.replace(" ", "\u00a0") for words in said), 100)
    if less:
        removals = f"{sum(less)} of {len(less)} removals"
        lines.insert(0, f"{removals} are shown to save less time than arithmetic (dashed)")
    return "\n".join(lines)


def bits_kept(differences: Sequence[Row], tolerance: float | None = None) -> str:
    """A title for one method: the fewest bits down to which it is shown to lose at most `tolerance`.

    `differences` are rows as for `answer`, over a grid of bits of weights and of activations. All pairs with
    as many bits or more must hold too. The fewest bits are the smallest product of the two.
    """
    if few := too_few(differences, "bits are enough"):
        return few
    score = differences[0]["metric"].removesuffix(" difference")
    tolerance = tolerance_of(score, tolerance)
    holds = {}
    for row in differences:
        verdict = not_worse(row["ci_low"], row["ci_high"], tolerance)
        holds[row["variant"].weight_bits, row["variant"].act_bits] = verdict == HOLDS
    kept = [(w, a) for w, a in holds if all(held for (v, b), held in holds.items() if v >= w and b >= a)]
    method = differences[0]["variant"].recipe
    if not kept:
        return f"{method}: no bits are shown to keep {score}"
    w, a = min(kept, key=lambda pair: pair[0] * pair[1])
    inputs = "activations in full" if a == 32 else f"{a} of activations"
    return f"{method}: {score} holds down to {w} bits of weights and {inputs}"


def rankings(correlations: Mapping[str, float], variants: int) -> str:
    """A title about measures by their rank correlations; those without one (NaN) are left out."""
    known = sorted(value for _, value in correlations.items() if not isnan(value))  # of pandas too
    if not known:
        return "No error ranks the variants"
    if variants < 10:
        return f"{variants} variants are too few to tell which error ranks them best"
    ends = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (known[0], known[-1])))
    return f"{len(known)} errors rank {variants} variants; rank correlations with PSNR: {ends}"


def most_added(differences: Sequence[Row], bits: str) -> str:
    """A title about the step that adds most to the one before; rows of direct comparisons, step by step."""
    if few := too_few(differences, "step adds anything"):
        return few
    points = "points" if differences[0]["unit"] == "%" else differences[0]["unit"]
    shown = [row for row in differences if row["ci_low"] > 0]
    if not shown:
        return f"No step is shown to add anything at {bits}"
    top = max(shown, key=lambda row: row["value"])
    return f"{top['variant'].recipe} adds most at {bits}: {with_interval(top)} {points}"


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


def attributes_lost(differences: Mapping[str, Sequence[Row]]) -> str:
    """A title about attributes that variants lose: the paired difference to fp32 lies below 0.

    `differences` has a row for each attribute, by the name of the variant.
    """
    counts = {name: sum(row["ci_high"] < 0 for row in rows) for name, rows in differences.items()}
    said = [f"{count} of {len(differences[name])} by {name}" for name, count in counts.items() if count]
    if not said:
        return "No variant is shown to lose an attribute"
    others = ["none by the others"] if 0 in counts.values() else []
    return f"Attributes that are shown to be lost: {', '.join(said + others)}"


def stays_below(curve: Sequence[tuple[float, float]], limit: float) -> str:
    """From which amount on the scores of a curve (amount, score) are below `limit`: "from 25 % on"."""
    if not curve:
        return "not measured"
    above = [amount for amount, score in curve if not score < limit]
    below = [amount for amount, _ in curve if not above or amount > max(above)]
    return f"from {min(below):g} % on" if below else f"not up to {max(above):g} %"
