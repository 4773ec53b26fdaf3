"""Published claims beside what the reports measured: every verdict follows from an interval by a rule."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, nan
from pathlib import Path
from typing import Any

from sdcomp.errors import UserError
from sdcomp.files import resolve_input

Row = dict[str, Any]
"""A row of a `metrics.csv`: numbers as floats (NaN where empty), `parameters` as a dictionary."""
NUMBERS = ("value", "ci_low", "ci_high", "n")

HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold"
UNKNOWN, MISSING = "cannot be told at this n", "not measured"
VERDICTS = (HOLDS, IN_PART, FAILS, UNKNOWN, MISSING)


# Tables of results


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of results. Raises UserError for a file that is none, or was cut short."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("its rows differ in length")
            row["parameters"] = dict(json.loads(row["parameters"]))
            row |= {name: float(row[name] or nan) for name in NUMBERS if name in row}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is no whole table of results ({error}); run its notebook again") from None
    return rows


def read_reports(folder: str | Path, model: str) -> list[Row]:
    """The rows about `model` of each `<report>/metrics.csv` in `folder`, with the folder's name as `report`.

    Raises UserError where there are none.
    """
    paths = sorted(resolve_input(folder).glob("*/metrics.csv"))
    rows = [{**row, "report": path.parent.name} for path in paths for row in read_rows(path)]
    rows = [row for row in rows if row.get("model") == model]
    if not rows:
        raise UserError(
            f"no {folder}/<study>/metrics.csv is about {model!r}: run the studies first (make study)"
        )
    return rows


def select(rows: Sequence[Row], parameters: Mapping[str, Any] | None = None, **columns: str) -> list[Row]:
    """The rows with these columns and, among others, these parameters; None stands for any but 0."""
    return [
        row
        for row in rows
        if all(row.get(name) == value for name, value in columns.items())
        and all(
            bool(row["parameters"].get(name)) if value is None else row["parameters"].get(name) == value
            for name, value in (parameters or {}).items()
        )
    ]


def difference(a: Row, b: Row) -> Row:
    """The difference of two results as if they were independent: squared half-widths add (Zou & Donner 2008).

    Two differences to the same images vary together, so the real interval is mostly narrower.
    """
    value = a["value"] - b["value"]
    low = value - hypot(a["value"] - a["ci_low"], b["ci_high"] - b["value"])
    high = value + hypot(a["ci_high"] - a["value"], b["value"] - b["ci_low"])
    return {**a, "value": value, "ci_low": low, "ci_high": high, "n": min(a["n"], b["n"])}


# Rules: what the interval of a difference, variant less baseline, says. NaN, no interval, says nothing.


def no_loss(low: float, high: float, tolerance: float) -> str:
    """At most `tolerance` worse: all of the interval is above -tolerance (non-inferiority)."""
    return HOLDS if low > -tolerance else FAILS if high < -tolerance else UNKNOWN


def loss(low: float, high: float, tolerance: float) -> str:
    """More than `tolerance` worse: all of the interval is below -tolerance."""
    return HOLDS if high < -tolerance else FAILS if low > -tolerance else UNKNOWN


def gain(low: float, high: float, tolerance: float) -> str:
    """Better: all of the interval is above 0. Not so where a gain of `tolerance` is ruled out."""
    return HOLDS if low > 0 else FAILS if high < tolerance else UNKNOWN


def large_gain(low: float, high: float, tolerance: float) -> str:
    """Better by more than `tolerance`; in part where only some gain is sure."""
    return HOLDS if low > tolerance else IN_PART if low > 0 else FAILS if high < tolerance else UNKNOWN


def time_saved(low: float, high: float, tolerance: float) -> str:
    """Of a time relative to the baseline's: more than `tolerance`, a share, is saved."""
    return HOLDS if high < 1 - tolerance else FAILS if low > 1 - tolerance else UNKNOWN


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those on its parts; what was not measured does not count.

    Where parts differ, one that holds makes it hold in part, and without such, one that fails makes it fail.
    """
    found = set(verdicts) - {MISSING}
    if len(found) <= 1:
        return found.pop() if found else MISSING
    return IN_PART if found & {HOLDS, IN_PART} else FAILS


# Claims


@dataclass(frozen=True)
class Finding:
    """What a part of a claim comes to: its row, None where it was not measured, and the rule's verdict."""

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
    """Which parts have which verdict, in words."""
    labels = {verdict: [f.label for f in findings if f.verdict == verdict] for verdict in VERDICTS}
    return "; ".join(f"{verdict}: {' / '.join(found)}" for verdict, found in labels.items() if found)


@dataclass(frozen=True)
class Part:
    """One comparison that a claim rests on; without a `rule` it is shown beside it and decides nothing.

    It stands in `report`, as `method` with `metric` (empty: the difference of the score that is judged by)
    to `baseline`, at `parameters` (see `select`). `tolerance` takes the place of the general one.
    """

    label: str
    report: str
    method: str
    baseline: str
    parameters: Mapping[str, float | None]
    rule: Callable[[float, float, float], str] | None = None
    metric: str = ""
    tolerance: float | None = None

    def find(self, rows: Sequence[Row], score: str) -> list[Row]:
        """The rows of this comparison; of two variants that were never compared directly, a `difference`."""
        columns = {"report": self.report, "metric": self.metric or f"{score} difference"}
        found = select(rows, self.parameters, method=self.method, baseline=self.baseline, **columns)
        if found:
            return found
        others = select(rows, method=self.baseline, **columns)
        return [
            {**difference(row, other), "baseline": self.baseline, "unpaired": True}
            for other in others
            if other["parameters"].items() <= self.parameters.items()
            for row in select(
                rows, self.parameters, method=self.method, baseline=other["baseline"], **columns
            )
        ]

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> list[Finding]:
        """What was measured, and what it says; `tolerance` is in the units of `score`."""
        limit = tolerance if self.tolerance is None else self.tolerance
        found = [
            Finding(self.label, row, self.rule(row["ci_low"], row["ci_high"], limit) if self.rule else "")
            for row in self.find(rows, score)
        ]
        return found or ([Finding(self.label, None, MISSING)] if self.rule else [])


@dataclass(frozen=True)
class Claim:
    """A published claim: the variants whose published figures it stands on, and the parts to judge it by.

    `published` names rows of `data/published.csv`: a label, their study and method, their parameters.
    """

    text: str
    published: Sequence[tuple[str, str, str, Mapping[str, Any]]]
    parts: Sequence[Part]

    def judge(self, rows: Sequence[Row], score: str, tolerance: float) -> tuple[str, list[Finding]]:
        """The verdict, and the findings that it follows from with those shown beside them."""
        found = [finding for part in self.parts for finding in part.judge(rows, score, tolerance)]
        return together([finding.verdict for finding in found if finding.verdict]), found

    def figures(self, published: Sequence[Row]) -> list[str]:
        """The published figures, variant by variant, with all their digits."""
        return [
            f"{label}: " + " / ".join(f"{row['value']:.7g}" for row in rows)
            for label, study, method, parameters in self.published
            if (rows := select(published, parameters, study=study, method=method))
        ]
