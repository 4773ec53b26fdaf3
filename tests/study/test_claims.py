"""Verdicts follow from the reports by rule, and every number beside them is a row of a report."""

from __future__ import annotations

import csv
import json
import math
import re
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from sdcomp.errors import UserError
from sdcomp.study import claims
from sdcomp.study.claims import FAILS, HOLDS, IN_PART, MISSING, UNKNOWN, Part, read_reports, read_rows, select
from sdcomp.study.run import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_claims.ipynb"
NAN = math.nan


def report(folder: Path, study: str, *rows: dict) -> None:
    """Write a report: rows with what matters, the rest as a run would write it."""
    (folder / study).mkdir(parents=True, exist_ok=True)
    with open(folder / study / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            fixed = {"study": study, "model": "data/tiny", "unit": "%", "n": 256}
            writer.writerow({**fixed, **row, "parameters": json.dumps(row.get("parameters", {}))})


def change(method: str, baseline: str, low: float, value: float, high: float, **parameters) -> dict:
    numbers = {"value": value, "ci_low": low, "ci_high": high}
    about = {"method": method, "baseline": baseline, "metric": "prompt accuracy difference"}
    return {**about, **numbers, "parameters": parameters}


# Rules


@pytest.mark.parametrize(
    ("rule", "low", "high", "verdict"),
    [
        ("no_loss", -4.9, -1, HOLDS),
        ("no_loss", -5.1, 3, UNKNOWN),
        ("no_loss", -30, -5.1, FAILS),
        ("loss", -30, -5.1, HOLDS),
        ("loss", -30, -4.9, UNKNOWN),
        ("loss", -4.9, 2, FAILS),
        ("gain", 0.1, 2, HOLDS),
        ("gain", -0.1, 5.1, UNKNOWN),
        ("gain", -0.1, 4.9, FAILS),
        ("gain", -9, -7, FAILS),
        ("large_gain", 5.1, 9, HOLDS),
        ("large_gain", 0.1, 9, IN_PART),
        ("large_gain", 0.1, 2, IN_PART),
        ("large_gain", -0.1, 9, UNKNOWN),
        ("large_gain", -0.1, 4.9, FAILS),
        *((rule, NAN, NAN, UNKNOWN) for rule in ("no_loss", "loss", "gain", "large_gain")),
    ],
)
def test_rules_by_the_interval_of_a_difference(rule, low, high, verdict):
    assert getattr(claims, rule)(low, high, 5.0) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.97, 0.989, HOLDS), (0.985, 1.004, UNKNOWN), (0.997, 0.999, FAILS), (NAN, NAN, UNKNOWN)],
)
def test_less_than_a_percent_of_time_is_not_time_saved(low, high, verdict):
    assert claims.time_saved(low, high, 0.01) == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, MISSING], HOLDS),
        ([HOLDS, FAILS, UNKNOWN], IN_PART),
        ([HOLDS, UNKNOWN], IN_PART),
        ([IN_PART, FAILS], IN_PART),
        ([FAILS, UNKNOWN], FAILS),
        ([UNKNOWN, UNKNOWN, MISSING], UNKNOWN),
        ([MISSING], MISSING),
        ([], MISSING),
    ],
)
def test_a_claim_of_several_parts(parts, verdict):
    assert claims.together(parts) == verdict


# Rows


def test_a_comparison_is_found_by_what_it_is_about(tmp_path):
    wanted = change("mse", "max", 1, 2, 3, weight_bits=6, act_bits=6)
    report(
        tmp_path,
        "01_quantization",
        change("mse", "full precision", -9, -8, -7, weight_bits=6, act_bits=6),
        change("mse", "max", -9, -8, -7, weight_bits=5, act_bits=5),
        {**wanted, "metric": "CLIP score difference", "value": 7},
        {**wanted, "model": "another", "value": 8},
        wanted,
    )
    report(tmp_path, "01_quantization_again", {**wanted, "study": "01_quantization", "value": 9})
    rows = read_reports(tmp_path, "data/tiny")
    part = Part("6", "01_quantization", "mse", "max", {"weight_bits": 6, "act_bits": 6}, claims.gain)
    assert [row["value"] for row in part.find(rows, "prompt accuracy")] == [2]
    (finding,) = part.judge(rows, "prompt accuracy", 5.0)
    assert (str(finding), finding.verdict) == ("6: 2.0 [1.0, 3.0]", HOLDS)
    assert [row["value"] for row in part.find(rows, "CLIP score")] == [7]
    (finding,) = part.judge(rows, "KID", 5.0)
    assert (str(finding), finding.verdict) == (f"6: {MISSING}", MISSING)


def test_any_value_of_a_parameter_is_any_but_zero(tmp_path):
    report(
        tmp_path,
        "s",
        *(change("m", "b", 0, a, 1, amount=a) for a in (0.0, 0.1, 0.2)),
        change("m", "b", 0, 9, 9),
    )
    rows = read_reports(tmp_path, "data/tiny")
    assert [row["value"] for row in select(rows, {"amount": None}, method="m")] == [0.1, 0.2]


def test_variants_never_compared_directly_differ_as_if_independent(tmp_path):
    bits = {"weight_bits": 8, "act_bits": 8}
    report(
        tmp_path,
        "01_quantization",
        change("mse", "full precision", 7, 10, 14, **bits),
        change("timestep_mse", "full precision", 1, 4, 8, **bits, k=10),
        change("timestep_mse", "full precision", 50, 60, 70, **bits, k=5),
    )
    part = Part("8", "01_quantization", "timestep_mse", "mse", {**bits, "k": 10}, claims.large_gain)
    (row,) = part.find(read_reports(tmp_path, "data/tiny"), "prompt accuracy")
    # 4 less 10; half-widths of 3 and 4 make 5.
    assert (row["value"], row["ci_low"], row["ci_high"]) == (-6, -11, -1)
    assert row["n"] == 256 and str(claims.Finding("8", row, FAILS)).endswith("]*")


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
def test_a_file_that_is_no_report_is_named(tmp_path, content):
    path = tmp_path / "02_pruning" / "metrics.csv"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        UserError, match=r"metrics.csv .*: run the studies|metrics.csv is no whole table.*again$"
    ):
        read_reports(tmp_path, "data/tiny")


def test_a_folder_without_reports_is_named(tmp_path):
    with pytest.raises(UserError, match="is about 'data/tiny': run the studies first"):
        read_reports(tmp_path, "data/tiny")


# What was published

UNSTRUCTURED = """32.0479/285.4887, 31.8656/229.5594, 31.8622/271.6414, 31.4858/196.5255, 30.8168/206.0148,
29.6732/190.6031, 28.3475/187.1944, 29.0634/285.8839, 23.9848/400.3852, 20.4875/591.2416, 18.2031/580.3256"""
STRUCTURED = "17.2078/501.1494, 17.126/403.7303, 17.1873/391.6009, 17.0274/446.6262"
SECONDS = """0.00798, 18.7447, 0.4698, 22.2020; 0.00645, 18.6458, 0.4643, 21.2035;
0.00635, 18.5629, 0.4628, 21.1294"""
EIGHT_BITS = """weights_only 32.1/175, max 25.9/521, max_filtered 28.9/354, mse 23.7/460,
mse_filtered 29.0/367, timestep_mse 31.9/214, timestep_mse_filtered 31.4/258"""


def test_published_figures_are_those_published():
    expected = {}
    for method, text, first in (("unstructured", UNSTRUCTURED, 0), ("masked channels", STRUCTURED, 5)):
        for i, pair in enumerate(text.split(",")):
            amount = (first + 5 * i) / 100
            for metric, value in zip(("CLIP score", "FID"), pair.split("/"), strict=True):
                expected["02_pruning", method, f'{{"amount": {amount}}}', metric] = float(value)
    for amount, line in zip((0.0, 0.2, 0.4), SECONDS.split(";"), strict=True):
        for component, value in zip(
            ("text encoder", "diffusion", "decoder", "total"), line.split(","), strict=True
        ):
            about = json.dumps({"amount": amount, "component": component})
            expected["03_profiling", "masked", about, "seconds"] = float(value)
    for entry in EIGHT_BITS.split(","):
        method, pair = entry.split()
        bits = json.dumps({"weight_bits": 8, "act_bits": 32 if method == "weights_only" else 8})
        for metric, value in zip(("CLIP score", "FID"), pair.split("/"), strict=True):
            expected["01_quantization", method, bits, metric] = float(value)
    rows = read_rows(ROOT / "data" / "published.csv")
    found = {(r["study"], r["method"], json.dumps(r["parameters"]), r["metric"]): r["value"] for r in rows}
    assert found == expected and len(rows) == len(expected) == 56
    assert all("Quantizing and Pruning Diffusion Models" in row["source"] for row in rows)
    assert all(("bar chart" in row["source"]) == (row["study"] == "01_quantization") for row in rows)


# The notebook


def code_cells() -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def judged(reports: Path) -> dict[str, str]:
    """The verdicts of the notebook's own cells on other reports."""
    parameters, _, *cells = code_cells()
    run = SimpleNamespace(record=lambda *_, **__: None, facts={})
    namespace: dict = {}
    exec(parameters.source, namespace)
    namespace |= {"run": run, "reports": str(reports)}
    for cell in cells:
        exec(cell.source, namespace)
        if "verdicts" in run.facts:
            break
    return run.facts["verdicts"]


def test_verdicts_follow_the_reports(tmp_path):
    eight, six = ({"weight_bits": bits, "act_bits": bits} for bits in (8, 6))
    alone = {"weight_bits": 8, "act_bits": 32}
    quantization = [
        change("weights_only", "full precision", -4, -2, 0, **alone),
        change("mse", "max", 1, 2, 3, **eight),
        change("mse", "max", -9, 0, 9, **six),
        change("timestep_mse", "mse", -1, 0, 1, **eight, k=10),
        change("timestep_mse", "mse", 20, 30, 40, **eight, k=5),
    ]
    report(tmp_path, "01_quantization", *quantization)
    whole = {"method": "unpruned", "metric": "prompt accuracy", "value": 80}
    masks = [
        change("masked channels", "unpruned", -60, -50, x, amount=a) for x, a in ((-41, 0.05), (-39, 0.1))
    ]
    report(tmp_path, "02_pruning", whole, *masks)
    verdicts = judged(tmp_path)
    assert list(verdicts.values()) == [
        HOLDS, MISSING, IN_PART, MISSING, FAILS, MISSING, IN_PART, MISSING, MISSING,
    ]  # fmt: skip

    # The same cells, after other runs.
    quantization[0] = change("weights_only", "full precision", -20, -15, -10, **alone)
    quantization[3] = change("timestep_mse", "mse", 6, 7, 8, **eight, k=10)
    report(tmp_path, "01_quantization", *quantization)
    sweet = change("unstructured + timestep_mse", "fp32", -9, -3, 3, amount=0.2, **eight, k=10)
    report(tmp_path, "04_combined", sweet)
    times = {"metric": "time relative to fp32", "unit": "x"}
    times = [{**change("masked", "fp32", 0.9, 0.95, 0.98, amount=a), **times} for a in (0.1, 0.7)]
    report(tmp_path, "03_profiling", *times)
    assert list(judged(tmp_path).values()) == [
        FAILS, MISSING, IN_PART, MISSING, HOLDS, MISSING, IN_PART, HOLDS, UNKNOWN,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every row of every report, as text, with what it is about."""
    found = []
    for path in sorted((ROOT / "reports").glob("*/metrics.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            found += [{**row, "report": path.parent.name} for row in csv.DictReader(file)]
    return found


def test_each_row_of_the_report_is_one_of_another_report_or_a_difference_of_two(rows):
    names = ("report", "method", "metric", "baseline", "parameters")
    others = {tuple(row[name] for name in names): row for row in rows}
    own = [row for row in rows if row["report"] == "05_claims" and row["ci_low"]]
    assert len(own) > 10
    for row in own:
        parameters = json.loads(row["parameters"])
        study, paired = parameters.pop("report"), parameters.pop("paired")
        about = json.dumps(parameters, sort_keys=True)
        source = others.get((study, row["method"], row["metric"], row["baseline"], about))
        if paired:
            assert all(row[name] == source[name] for name in ("value", "ci_low", "ci_high", "n"))
            continue
        assert source is None
        less = json.dumps({k: v for k, v in parameters.items() if k != "k"}, sort_keys=True)
        a, b = (
            float(others[study, method, row["metric"], "full precision", which]["value"])
            for method, which in ((row["method"], about), (row["baseline"], less))
        )
        assert float(row["value"]) == pytest.approx(a - b, abs=1e-4)


TRIPLE = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")


def untraced(html: str, rows: list[dict]) -> list[tuple]:
    """Each "value [low, high]" of the table of claims that is not the report's at its place."""
    own = [row for row in rows if row["report"] == "05_claims" and row["ci_low"]]
    shown = TRIPLE.findall(html)
    return [
        (numbers, row)
        for numbers, row in zip_longest(shown, own)
        if not numbers
        or not row
        or numbers
        != tuple(
            f"{float(row[name]):.{len(numbers[0].partition('.')[2])}f}"
            for name in ("value", "ci_low", "ci_high")
        )
    ]


def shown(containing: str) -> str:
    """What the notebook's cell shows, as it is committed."""
    (cell,) = (cell for cell in code_cells() if containing in cell.source)
    return cell.outputs[0].data["text/html"]


def test_each_number_of_the_table_is_a_row_of_the_report(rows):
    html = shown("to_html")
    assert untraced(html, rows) == [], "run the full profile, then `make goldens`"
    for number in [match.span(i) for match in TRIPLE.finditer(html) for i in (1, 2, 3)]:
        for place in (i for i in range(*number) if html[i].isdigit()):
            changed = html[:place] + str((int(html[place]) + 1) % 10) + html[place + 1 :]
            assert len(untraced(changed, rows)) == 1, html[place - 20 : place + 20]


def test_each_number_about_few_images_is_a_row_of_a_report(rows):
    cells = re.findall(r"<td>(.*?)</td>", shown("the same at n"))
    numbers = {
        (row["metric"], json.loads(row["parameters"])["amount"]): row
        for row in rows
        if row["method"] == "unstructured"
        and "amount" in row["parameters"]
        and row["report"] == ("02_pruning" if "difference" in row["metric"] else "05_claims")
        and not (row["report"] == "05_claims" and row["ci_low"])
    }
    amounts = [amount for metric, amount in numbers if metric == "half of the interval"]
    expected = []
    for amount in amounts:
        change = numbers["prompt accuracy difference", amount]
        half = numbers["half of the interval", amount]["value"]
        few = numbers["the same at n = 10", amount]["value"]
        expected += [change["value"], change["n"], half, few]
        assert float(half) == pytest.approx(
            (float(change["ci_high"]) - float(change["ci_low"])) / 2, abs=1e-3
        )
        assert float(few) == pytest.approx(float(half) * math.sqrt(int(change["n"]) / 10), abs=1e-3)
    assert len(cells) > 10 and cells == [f"{float(number):.1f}" for number in expected]


def test_the_answer_is_that_of_the_report():
    record = json.loads((ROOT / "reports" / "05_claims" / "run.json").read_text(encoding="utf-8"))
    question = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    answers = []
    for verdict in claims.VERDICTS:
        texts = [text for text, found in record["verdicts"].items() if found == verdict]
        answers += [f"- **{verdict}**: {'; '.join(texts)}"] if texts else []
        assert len(re.findall(f">{verdict}</td>", shown("to_html"))) == len(texts), "run `make goldens`"
    assert [line for line in question.splitlines() if line.startswith("- **")] == answers
