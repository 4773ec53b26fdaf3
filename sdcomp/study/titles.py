"""Titles of figures that say what the rows of a run bear."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import isnan

from sdcomp.study.answers import tolerance_of, too_few
from sdcomp.study.claims import HOLDS, not_worse
from sdcomp.study.results import Row
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
    """
    less = [row["ci_low"] > left for row in times if (left := arithmetic.get(row["variant"])) is not None]
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
    tolerance = tolerance_of(differences, tolerance)
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
    """A title about measures by their rank correlations; those within `margin` of the best are equal.

    Measures without a rank correlation (NaN) are left out.
    """
    known = ((name, value) for name, value in correlations.items() if not isnan(value))
    ranked = sorted(known, key=lambda item: -item[1])
    if not ranked:
        return "No error is shown to rank the variants"
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
    above = [amount for amount, score in curve if not score < limit]
    below = [amount for amount, _ in curve if not above or amount > max(above)]
    return f"from {min(below):g} % on" if below else "nowhere"
