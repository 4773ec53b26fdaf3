"""Rows of results: written, read back, and found again in the reports of other runs."""

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_variants import variants

from sdcomp.errors import UserError
from sdcomp.files import ROOT
from sdcomp.study import FP32, pruned
from sdcomp.study.results import COLUMNS, columns, read_reports, read_rows, select, typed

ABOUT = st.dictionaries(st.sampled_from(["timestep", "component", "budget"]), st.integers(0, 9))


@given(variants(), ABOUT)
def test_a_variant_is_read_back_from_its_row(variant, about):
    row = columns(variant, about)
    found = typed({"method": row["method"], "parameters": json.loads(row["parameters"])})
    assert (found["variant"], found["about"], found["label"]) == (variant, about, variant.label)


@given(st.sampled_from(["machine", "reader", "training: UNet", "unstructured", "removed, recovered"]), ABOUT)
def test_a_row_about_something_else_has_no_variant(name, about):
    row = columns(name, about)
    found = typed({"method": row["method"], "parameters": json.loads(row["parameters"])})
    assert (found["variant"], found["about"], found["label"]) == (None, about, name)


def test_a_field_of_the_variant_is_not_said_twice():
    with pytest.raises(ValueError, match="^amount, k: give this to the Variant"):
        columns(FP32, {"amount": 0.3, "k": 2, "timestep": 1})


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_numbers_are_numbers_and_empty_cells_are_nan(tmp_path):
    write(
        tmp_path / "metrics.csv", {**columns(FP32, {"timestep": 9}), "metric": "a", "value": "0.5", "n": "8"}
    )
    (row,) = read_rows(tmp_path / "metrics.csv")
    assert (row["variant"], row["about"], row["value"], row["n"]) == (FP32, {"timestep": 9}, 0.5, 8.0)
    assert math.isnan(row["ci_low"]) and row["baseline"] == ""


BROKEN = {
    "empty": "",
    "cut short": ",".join(COLUMNS) + "\nr,s,data/tiny,m",
    "too long": ",".join(COLUMNS) + "\n" + "," * 20,
    "no numbers": ",".join(COLUMNS) + "\nr,s,data/tiny,m,{},metric,high,,,,,\n",
    "no parameters": ",".join(COLUMNS) + "\nr,s,data/tiny,m,amount,metric,1,,,,,\n",
    "parameters of another kind": ",".join(COLUMNS) + "\nr,s,data/tiny,m,3,metric,1,,,,,\n",
    "other columns": "a,b\n1,2\n",
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_a_report_is_named(tmp_path, content):
    path = tmp_path / "02_pruning" / "metrics.csv"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"metrics.csv .*: run the studies|metrics.csv is not a complete table.*again$"
    ):
        read_reports(tmp_path, "data/tiny")


def test_a_folder_without_reports_is_named(tmp_path):
    with pytest.raises(UserError, match="is about 'data/tiny': run the studies first"):
        read_reports(tmp_path, "data/tiny")


def test_reports_are_read_with_their_folder_and_for_one_model(tmp_path):
    for folder, model in (("02_pruning", "data/tiny"), ("02_again", "data/tiny"), ("03_other", "another")):
        row = {**columns(FP32, {}), "study": "02_pruning", "model": model, "value": "1"}
        write(tmp_path / folder / "metrics.csv", row)
    found = read_reports(tmp_path, "data/tiny")
    assert [row["report"] for row in found] == ["02_again", "02_pruning"]


def test_rows_are_selected_by_variant_columns_and_what_they_are_about():
    some = [
        typed({**columns(variant, about), "parameters": variant.parameters | about, "metric": metric})
        for variant in (FP32, pruned("removed", 0.5))
        for about in ({}, {"component": "UNet", "batch": 5})
        for metric in ("time", "bytes")
    ]
    assert len(select(some, metric="time")) == 4 and len(select(some, variant=FP32)) == 4
    assert len(select(some, {"component": "UNet"}, variant=FP32, metric="time")) == 1
    assert select(some, {"component": "decoder"}) == []


def test_every_row_of_the_committed_reports_is_about_what_its_columns_say():
    """What is not a variant: an instrument, a training, a knee, a recommendation, variants or images."""
    others = set()
    for path in sorted(ROOT.glob("reports/[0-9][0-9]_*/metrics.csv")):
        others |= {
            row["metric"] for row in read_rows(path) if row["variant"] is None and "00_" not in str(path)
        }
    ranks = {f"rank correlation with {quality}" for quality in ("PSNR", "prompt accuracy")}
    few = {"half of the narrowest interval", "smallest loss that is shown"}
    assert others <= {"peak", "knee", "recommended", *ranks, *few}
