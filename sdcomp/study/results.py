"""Results as rows: how a variant is written into the columns of `metrics.csv`, and read back."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from math import isfinite, nan
from pathlib import Path
from typing import Any

import pandas as pd

from sdcomp.errors import UserError
from sdcomp.files import resolve_input
from sdcomp.study.variants import FP32, Variant

Row = dict[str, Any]
"""One result: the columns of `metrics.csv`, with numbers as floats (NaN where empty) and `parameters` as a
dictionary. `typed` adds `variant`, `about` and `label`."""

COLUMNS = (
    "run_id", "study", "model", "method", "parameters", "metric",
    "value", "ci_low", "ci_high", "n", "unit", "baseline",
)  # fmt: skip
FIELDS = {field.name for field in fields(Variant)}
FAILED = "failed"
"""The metric of a variant that gave no images; the unit says why."""
NUMBERS = ("value", "ci_low", "ci_high", "n")


def columns(subject: Variant | str, about: dict[str, Any]) -> dict[str, str]:
    """The columns `method` and `parameters` of a result.

    `subject` is a variant, or a text for something else, such as "machine". `about` says more about the
    result, such as its timestep. Raises ValueError where `about` has a field of a variant.
    """
    if not isinstance(subject, Variant):
        return {"method": subject, "parameters": json.dumps(about, sort_keys=True)}
    if taken := FIELDS & about.keys():
        raise ValueError(f"{', '.join(sorted(taken))}: give this to the Variant, not to the result")
    return {
        "method": subject.method,
        "parameters": json.dumps(subject.parameters | about, sort_keys=True),
    }


def with_interval(row: Row) -> str:
    """The value with its interval in brackets, where it has one."""
    ends = f" [{row['ci_low']:.1f}, {row['ci_high']:.1f}]" if isfinite(row["ci_low"]) else ""
    return f"{row['value']:.1f}{ends}"


def typed(row: Row) -> Row:
    """The row with three more entries.

    `variant` is None where the row is about something else; `about` has the parameters that do not belong to
    the variant; `label` names the subject.
    """
    parameters = row["parameters"]
    try:
        variant = Variant(**{name: value for name, value in parameters.items() if name in FIELDS})
    except ValueError:
        variant = None
    if variant is None or variant.method != row["method"]:
        return {**row, "variant": None, "about": parameters, "label": row["method"]}
    about = {name: value for name, value in parameters.items() if name not in FIELDS}
    return {**row, "variant": variant, "about": about, "label": variant.label}


def name_of(subject: Variant | str) -> str:
    """The text for a subject in the column `baseline`."""
    return subject.label if isinstance(subject, Variant) else subject


def read_rows(path: Path) -> list[Row]:
    """The `typed` rows of a table of results. Raises UserError for another file, or one that is cut short."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("its rows differ in length")
            row["parameters"] = dict(json.loads(row["parameters"]))
            row |= {name: float(row[name] or nan) for name in NUMBERS if name in row}
        return [typed(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a complete table of results ({error}); run its notebook again"
        ) from None


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


def select(rows: Iterable[Row], about: dict[str, Any] | None = None, **columns: Any) -> list[Row]:
    """The rows whose columns (or `variant`) have these values, and whose own `about` contains `about`."""
    return [
        row
        for row in rows
        if all(row.get(name) == value for name, value in columns.items())
        and (about is None or about.items() <= row["about"].items())
    ]


# Tables


def table(rows: Iterable[Row], metrics: Sequence[str] = (), direct: bool = False) -> pd.DataFrame:
    """Results as text: a row for each subject, a column for each metric (default: all), with intervals.

    A difference to another variant than the baseline is in the table with `direct`, and only there. A
    variant that failed is in the other one, with the reason.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        failed = row["metric"] == FAILED
        wanted = failed or not metrics or row["metric"] in metrics
        if not wanted or (row["variant"] is not None and row["baseline"] not in ("", FP32.label)) != direct:
            continue
        label = f"{row['label']} less {row['baseline']}" if direct else row["label"]
        about = ", ".join(f"{name} {value}" for name, value in row["about"].items())
        if failed:
            column, cell = FAILED, row["unit"]
        else:
            interval = "" if row["ci_low"] == "" else f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
            column = f"{row['metric']} ({row['unit']})" if row["unit"] else row["metric"]
            cell = f"{row['value']:.4g}{interval}"
        cells.setdefault((label, about), {})[column] = cell
    index = pd.MultiIndex.from_tuples(list(cells), names=["variant", "of"])
    found = pd.DataFrame(list(cells.values()), index).fillna("")
    return found if any(about for _, about in cells) else found.droplevel("of")
