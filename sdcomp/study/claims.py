"""Published claims beside measured results: a rule turns each interval into a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import hypot
from typing import Any

import numpy as np

from sdcomp.evaluation.timing import ENOUGH_TIMES
from sdcomp.study.results import Row, select
from sdcomp.study.variants import FP32, Variant

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
NO_ROOM, UNKNOWN, MISSING = "no room", "cannot be told", "not measured"
VERDICTS = (HOLDS, IN_PART, FAILS, NO_ROOM, UNKNOWN, MISSING)


# Rules: the verdict from the interval of a difference, variant minus baseline. NaN (no interval) is UNKNOWN.


def not_worse(low: float, high: float, tolerance: float) -> str:
    """At most `tolerance` worse: the whole interval is above -tolerance (non-inferiority)."""
    return HOLDS if low > -tolerance else FAILS if high < -tolerance else UNKNOWN


def same(low: float, high: float, tolerance: float) -> str:
    """Equivalent: the whole interval is between -tolerance and tolerance.

    These are two one-sided tests (Schuirmann 1987), at 2.5 % each for a 95 % interval.
    """
    if -tolerance < low and high < tolerance:
        return HOLDS
    return FAILS if high < -tolerance or low > tolerance else UNKNOWN


def is_worse(low: float, high: float, tolerance: float) -> str:
    """More than `tolerance` worse: the whole interval is below -tolerance."""
    return HOLDS if high < -tolerance else FAILS if low > -tolerance else UNKNOWN


def is_better(low: float, high: float, tolerance: float) -> str:
    """Better: the whole interval is above 0. It fails where a gain of `tolerance` is ruled out."""
    return HOLDS if low > 0 else FAILS if high < tolerance else UNKNOWN


def is_much_better(low: float, high: float, tolerance: float) -> str:
    """Better by more than `tolerance`. It holds in part where only some gain is certain."""
    return HOLDS if low > tolerance else IN_PART if low > 0 else FAILS if high < tolerance else UNKNOWN


def falls(low: float, high: float, tolerance: float) -> str:
    """Smaller: the whole interval is below 0. It fails where a fall by `tolerance` is ruled out."""
    return HOLDS if high < 0 else FAILS if low > -tolerance else UNKNOWN


Rule = Callable[[float, float, float], str]


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from the verdicts on its statements, which are those that were published.

    The claim holds where all of them hold, and in part where some do. Otherwise one that fails decides.
    """
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    if found & {HOLDS, IN_PART}:
        return IN_PART
    return next((verdict for verdict in VERDICTS if verdict in found), MISSING)


# Comparisons


def difference(a: Row, b: Row) -> Row:
    """The difference of two results as if they were independent: squared half-widths add (Zou & Donner 2008).

    Two differences to the same images vary together, so the true interval is mostly narrower.
    """
    value = a["value"] - b["value"]
    low = value - hypot(a["value"] - a["ci_low"], b["ci_high"] - b["value"])
    high = value + hypot(a["ci_high"] - a["value"], b["value"] - b["ci_low"])
    return {**a, "value": value, "ci_low": low, "ci_high": high, "n": min(a["n"], b["n"])}


@dataclass(frozen=True)
class Comparison:
    """`variant` minus `baseline` in `report`. An empty `metric` is the score that the verdicts go by."""

    label: str
    report: str
    variant: Variant
    baseline: Variant = FP32
    metric: str = ""

    def find(self, rows: Sequence[Row], score: str) -> Row | None:
        """The row of this comparison; for variants that were never compared directly, a `difference`."""
        metric = self.metric or f"{score} difference"

        def row(variant: Variant, baseline: Variant) -> Row | None:
            about = {"report": self.report, "metric": metric, "variant": variant, "baseline": baseline.label}
            return next(iter(select(rows, **about)), None)

        if found := row(self.variant, self.baseline):
            return found
        one, other = row(self.variant, FP32), row(self.baseline, FP32)
        if one is None or other is None:
            return None
        return {**difference(one, other), "baseline": self.baseline.label, "source": "unpaired"}

    def loss(self, rows: Sequence[Row], score: str, damaged: str) -> Row | None:
        """The difference to fp32 of the one that is `damaged`: "variant" or "baseline"."""
        return Comparison(self.label, self.report, getattr(self, damaged)).find(rows, score)


@dataclass(frozen=True)
class Trend(Comparison):
    """The change of a time in percent at the amount of `variant`, from all amounts of its kind.

    The line goes through the baseline's time at amount 0 and has the least squared errors. Its interval is
    that of independent times. Times that were measured fewer than `ENOUGH_TIMES` times do not count.
    """

    metric: str = "time relative to fp32"

    def find(self, rows: Sequence[Row], score: str) -> Row | None:
        """The row of the line at the amount, None without measured times."""
        kind = self.variant.describe(amount=False)
        found = [
            row
            for row in select(rows, report=self.report, metric=self.metric)
            if row["variant"]
            and row["variant"].amount
            and row["variant"].describe(amount=False) == kind
            and row["n"] >= ENOUGH_TIMES
        ]
        if not found:
            return None
        amounts = np.array([row["variant"].amount for row in found])
        changes = np.array([100 * (row["value"] - 1) for row in found])
        reach = np.array([100 * (row["ci_high"] - row["ci_low"]) / 2 for row in found])
        slope = (amounts * changes).sum() / (amounts**2).sum()
        error = np.sqrt((amounts**2 * reach**2).sum()) / (amounts**2).sum()
        value, half = self.variant.amount * slope, self.variant.amount * error
        ends = {"value": float(value), "ci_low": float(value - half), "ci_high": float(value + half)}
        return {**found[0], "variant": self.variant, "unit": "%", "source": "trend", **ends}


# Statements


@dataclass(frozen=True)
class Finding:
    """What decides on a statement: the comparison, its row (None: not measured), and the verdict."""

    statement: str
    comparison: Comparison | None
    row: Row | None
    verdict: str

    def __str__(self) -> str:
        return MISSING if self.row is None else f"{self.comparison.label}: {show(self.row)}"


def show(row: Row) -> str:
    """A value with its interval; * marks one that is not of a paired comparison."""
    form = ".1f" if row["unit"] in ("%", "100 x cosine", "x 1000") else ".3f"
    value, low, high = (format(row[name], form) for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]{'*' if row.get('source') == 'unpaired' else ''}"


@dataclass(frozen=True)
class Statement:
    """One half of a claim: what was said, the rule that tests it, and where it was measured.

    The first of `points` decides, the one that was published; the others are shown. With `damaged`
    ("variant" or "baseline") the points are compared at matched damage instead: the one decides where that
    UNet begins to lose, which is the smallest loss to fp32 that exceeds the tolerance for certain. A baseline
    without such a loss leaves `NO_ROOM` for a gain. So more points do not add weight. `tolerance` replaces
    the general one.
    """

    text: str
    rule: Rule
    points: Sequence[Comparison]
    damaged: str = ""
    tolerance: float | None = None

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> Finding:
        """What decides, and the verdict."""
        limit = tolerance if self.tolerance is None else self.tolerance
        if not self.damaged:
            return self._finding(self.points[0], rows, score, limit)
        losses = [(point, point.loss(rows, score, self.damaged)) for point in self.points]
        losses = [(point, loss) for point, loss in losses if loss and point.find(rows, score)]
        if not losses:
            return Finding(self.text, None, None, MISSING)
        room = [(point, loss) for point, loss in losses if is_worse(*_ends(loss), limit) == HOLDS]
        # The smallest loss that counts; without one, the largest loss that there is.
        point, _ = (max if room else min)(room or losses, key=lambda pair: pair[1]["value"])
        found = self._finding(point, rows, score, limit)
        return found if room or self.damaged == "variant" else replace(found, verdict=NO_ROOM)

    def _finding(self, point: Comparison, rows: Sequence[Row], score: str, limit: float) -> Finding:
        row = point.find(rows, score)
        verdict = MISSING if row is None else self.rule(*_ends(row), limit)
        return Finding(self.text, point, row, verdict)

    def others(self, rows: Sequence[Row], score: str, decisive: Comparison | None) -> list[Finding]:
        """The points that do not decide and were measured."""
        rest = [(point, point.find(rows, score)) for point in self.points if point != decisive]
        return [Finding(self.text, point, row, "") for point, row in rest if row]


def _ends(row: Row) -> tuple[float, float]:
    return row["ci_low"], row["ci_high"]


def told(statement: Statement, finding: Finding, rows: Sequence[Row]) -> str:
    """A statement and its verdict in one line; with where it was decided, if at matched damage."""
    matched = statement.damaged and len(statement.points) > 1 and finding.comparison
    notes = [f"at {finding.comparison.label}"] if matched else []
    notes += [DISAGREE] if disagree(finding, rows) else []
    return f"{finding.statement}: {finding.verdict}" + (f" ({', '.join(notes)})" if notes else "")


DISAGREE = "metrics disagree"
JUDGES = {"prompt accuracy": 1, "CLIP score": 1, "SSIM": 1, "KID": -1, "squared error": -1}
"""Metrics that are shown side by side; the sign says whether more is better."""


def side_by_side(finding: Finding, rows: Sequence[Row]) -> dict[str, tuple[Row, int]]:
    """The comparison that decides, by every metric: its row, and 1 for better, -1 for worse, 0 for neither.

    A comparison of times has no other metric.
    """
    if finding.row is None or finding.comparison.metric:
        return {}
    found = {metric: finding.comparison.find(rows, metric) for metric in JUDGES}
    return {
        metric: (row, JUDGES[metric] * (int(row["ci_low"] > 0) - int(row["ci_high"] < 0)))
        for metric, row in found.items()
        if row
    }


def disagree(finding: Finding, rows: Sequence[Row]) -> bool:
    """Whether one metric shows an effect and another does not, or shows the opposite."""
    return len({sign for _, sign in side_by_side(finding, rows).values()}) > 1


# Claims


@dataclass(frozen=True)
class Published:
    """The figures of one variant in `data/published.csv`; `about` selects among its rows."""

    label: str
    study: str
    variant: Variant
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A published claim, with the figures that it was drawn from and the statements that it consists of."""

    text: str
    published: Sequence[Published]
    statements: Sequence[Statement]

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> tuple[str, list[Finding]]:
        """The verdict, and what decides on each statement."""
        found = [statement.judge(rows, score, tolerance) for statement in self.statements]
        return together([finding.verdict for finding in found]), found

    def figures(self, published: Sequence[Row]) -> list[str]:
        """The published figures, variant by variant, with all their digits."""
        return [
            f"{p.label}: " + " / ".join(f"{row['value']:.7g}" for row in rows)
            for p in self.published
            if (rows := select(published, dict(p.about), study=p.study, variant=p.variant))
        ]
