"""Published claims beside measured results: a rule turns each interval into a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any

from sdcomp.study.results import Row, select
from sdcomp.study.variants import FP32, Variant

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
UNKNOWN, MISSING = "cannot be told at this n", "not measured"
VERDICTS = (HOLDS, IN_PART, FAILS, UNKNOWN, MISSING)


# Rules: the verdict from the interval of a difference, variant minus baseline. NaN (no interval) is UNKNOWN.


def not_worse(low: float, high: float, tolerance: float) -> str:
    """At most `tolerance` worse: the whole interval is above -tolerance (non-inferiority)."""
    return HOLDS if low > -tolerance else FAILS if high < -tolerance else UNKNOWN


def is_worse(low: float, high: float, tolerance: float) -> str:
    """More than `tolerance` worse: the whole interval is below -tolerance."""
    return HOLDS if high < -tolerance else FAILS if low > -tolerance else UNKNOWN


def is_better(low: float, high: float, tolerance: float) -> str:
    """Better: the whole interval is above 0. It fails where a gain of `tolerance` is ruled out."""
    return HOLDS if low > 0 else FAILS if high < tolerance else UNKNOWN


def is_much_better(low: float, high: float, tolerance: float) -> str:
    """Better by more than `tolerance`. It holds in part where only some gain is certain."""
    return HOLDS if low > tolerance else IN_PART if low > 0 else FAILS if high < tolerance else UNKNOWN


def saves_time(low: float, high: float, tolerance: float) -> str:
    """For a time relative to the baseline's: more than the share `tolerance` is saved."""
    return HOLDS if high < 1 - tolerance else FAILS if low > 1 - tolerance else UNKNOWN


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from the verdicts on its parts. Parts that were not measured do not count.

    Where verdicts differ, the claim holds in part if some part holds. If none does, and one fails, it fails.
    """
    found = set(verdicts) - {MISSING}
    if len(found) <= 1:
        return found.pop() if found else MISSING
    return IN_PART if found & {HOLDS, IN_PART} else FAILS


def difference(a: Row, b: Row) -> Row:
    """The difference of two results as if they were independent: squared half-widths add (Zou & Donner 2008).

    Two differences to the same images vary together, so the true interval is mostly narrower.
    """
    value = a["value"] - b["value"]
    low = value - hypot(a["value"] - a["ci_low"], b["ci_high"] - b["value"])
    high = value + hypot(a["ci_high"] - a["value"], b["value"] - b["ci_low"])
    return {**a, "value": value, "ci_low": low, "ci_high": high, "n": min(a["n"], b["n"])}


@dataclass(frozen=True)
class Finding:
    """The result for one comparison: its row (None: not measured) and the verdict of the rule."""

    label: str
    row: Row | None
    verdict: str

    def __str__(self) -> str:
        if self.row is None:
            return f"{self.label}: {MISSING}"
        form = ".1f" if self.row["unit"] in ("%", "100 x cosine") else ".3f"
        value, low, high = (format(self.row[name], form) for name in ("value", "ci_low", "ci_high"))
        return f"{self.label}: {value} [{low}, {high}]{'*' if 'unpaired' in self.row else ''}"


def by_verdict(findings: Sequence[Finding]) -> str:
    """Which comparisons have which verdict, in words."""
    labels = {verdict: [f.label for f in findings if f.verdict == verdict] for verdict in VERDICTS}
    return "; ".join(f"{verdict}: {' / '.join(found)}" for verdict, found in labels.items() if found)


@dataclass(frozen=True)
class Comparison:
    """One comparison that a claim rests on: `variant` minus `baseline` in `report`, by `metric`.

    An empty `metric` is the difference of the score that the verdicts go by. Without a `rule` the comparison
    is shown and decides nothing. `tolerance` replaces the general one.
    """

    label: str
    report: str
    variant: Variant
    baseline: Variant = FP32
    rule: Callable[[float, float, float], str] | None = None
    metric: str = ""
    tolerance: float | None = None

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
        return {**difference(one, other), "baseline": self.baseline.label, "unpaired": True}

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> Finding | None:
        """The row and its verdict; None where it decides nothing and was not measured."""
        row = self.find(rows, score)
        if row is None:
            return Finding(self.label, None, MISSING) if self.rule else None
        limit = tolerance if self.tolerance is None else self.tolerance
        verdict = self.rule(row["ci_low"], row["ci_high"], limit) if self.rule else ""
        return Finding(self.label, row, verdict)


@dataclass(frozen=True)
class Published:
    """The figures of one variant in `data/published.csv`; `about` selects among its rows."""

    label: str
    study: str
    variant: Variant
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A published claim, with the figures that it was drawn from and the comparisons that judge it."""

    text: str
    published: Sequence[Published]
    comparisons: Sequence[Comparison]

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> tuple[str, list[Finding]]:
        """The verdict, and all findings, those that decide nothing included."""
        judged = [comparison.judge(rows, score, tolerance) for comparison in self.comparisons]
        found = [finding for finding in judged if finding]
        return together([finding.verdict for finding in found if finding.verdict]), found

    def figures(self, published: Sequence[Row]) -> list[str]:
        """The published figures, variant by variant, with all their digits."""
        return [
            f"{p.label}: " + " / ".join(f"{row['value']:.7g}" for row in rows)
            for p in self.published
            if (rows := select(published, dict(p.about), study=p.study, variant=p.variant))
        ]
