"""Verdicts follow from the reports by rule, and every number beside them is a row of a report."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

from sdcomp.study import FP32, Variant, claims, pruned, quantized
from sdcomp.study.claims import (
    FAILS,
    HOLDS,
    IN_PART,
    MISSING,
    NO_ROOM,
    UNKNOWN,
    Claim,
    Comparison,
    Statement,
    Trend,
)
from sdcomp.study.results import COLUMNS, columns, read_reports, read_rows

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
            writer.writerow({"study": study, "model": "data/tiny", "unit": "%", "n": 256, **row})


def change(variant: Variant, baseline: Variant, low: float, value: float, high: float) -> dict:
    numbers = {"value": value, "ci_low": low, "ci_high": high}
    about = {"baseline": baseline.label, "metric": "prompt accuracy difference"}
    return {**columns(variant, {}), **about, **numbers}


def at(bits: int, recipe: str, k: int = 0) -> Variant:
    return quantized(recipe, bits, 32 if recipe == "weights_only" else bits, k)


# Rules


@pytest.mark.parametrize(
    ("rule", "low", "high", "verdict"),
    [
        ("not_worse", -4.9, -1, HOLDS),
        ("not_worse", -5.1, 3, UNKNOWN),
        ("not_worse", -30, -5.1, FAILS),
        ("is_worse", -30, -5.1, HOLDS),
        ("is_worse", -30, -4.9, UNKNOWN),
        ("is_worse", -4.9, 2, FAILS),
        ("is_better", 0.1, 2, HOLDS),
        ("is_better", -0.1, 5.1, UNKNOWN),
        ("is_better", -0.1, 4.9, FAILS),
        ("is_better", -9, -7, FAILS),
        ("is_much_better", 5.1, 9, HOLDS),
        ("is_much_better", 0.1, 9, IN_PART),
        ("is_much_better", 0.1, 2, IN_PART),
        ("is_much_better", -0.1, 9, UNKNOWN),
        ("is_much_better", -0.1, 4.9, FAILS),
        ("same", -4.9, 4.9, HOLDS),
        ("same", -4.9, 5.1, UNKNOWN),
        ("same", -9, 9, UNKNOWN),
        ("same", -9, -5.1, FAILS),
        ("same", 5.1, 9, FAILS),
        ("falls", -9, -0.1, HOLDS),
        ("falls", -4.9, 0.1, FAILS),
        ("falls", -5.1, 0.1, UNKNOWN),
        *(
            (rule, NAN, NAN, UNKNOWN)
            for rule in ("not_worse", "same", "is_worse", "is_better", "is_much_better", "falls")
        ),
    ],
)
def test_rules_by_the_interval_of_a_difference(rule, low, high, verdict):
    assert getattr(claims, rule)(low, high, 5.0) == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, MISSING], IN_PART),
        ([HOLDS, NO_ROOM], IN_PART),
        ([HOLDS, FAILS], IN_PART),
        ([IN_PART, FAILS], IN_PART),
        ([FAILS, UNKNOWN], FAILS),
        ([NO_ROOM, FAILS], FAILS),
        ([NO_ROOM, UNKNOWN], NO_ROOM),
        ([UNKNOWN, MISSING], UNKNOWN),
        ([MISSING, MISSING], MISSING),
    ],
)
def test_a_claim_of_several_statements(parts, verdict):
    assert claims.together(parts) == verdict


# Rows


def test_a_comparison_is_found_by_what_it_is_about(tmp_path):
    wanted = change(at(6, "mse"), at(6, "max"), 1, 2, 3)
    report(
        tmp_path,
        "01_quantization",
        change(at(6, "mse"), FP32, -9, -8, -7),
        change(at(5, "mse"), at(5, "max"), -9, -8, -7),
        {**wanted, "metric": "CLIP score difference", "value": 7},
        {**wanted, "model": "another", "value": 8},
        wanted,
    )
    report(tmp_path, "01_quantization_again", {**wanted, "study": "01_quantization", "value": 9})
    rows = read_reports(tmp_path, "data/tiny")
    comparison = Comparison("6", "01_quantization", at(6, "mse"), at(6, "max"))
    statement = Statement("better", claims.is_better, [comparison])
    finding = statement.judge(rows, "prompt accuracy", 5.0)
    assert (str(finding), finding.verdict) == ("6: 2.0 [1.0, 3.0]", HOLDS)
    assert comparison.find(rows, "CLIP score")["value"] == 7
    finding = statement.judge(rows, "KID", 5.0)
    assert (str(finding), finding.verdict) == (MISSING, MISSING)


def measured(*rows: dict, metric: str = "prompt accuracy difference") -> list[dict]:
    """Made-up rows as they are read from a report."""
    found = []
    for row in rows:
        variant = Variant(**json.loads(row["parameters"]))
        about = {"report": "01_quantization", "variant": variant, "about": {}, "unit": "%", "n": 256}
        found.append({"metric": metric, **row, **about, "label": variant.label})
    return found


def remedy(*bits: int) -> Statement:
    """mse regains what max loses, measured at these bits."""
    points = [Comparison(f"{b}", "01_quantization", at(b, "mse"), at(b, "max")) for b in bits]
    return Statement("mse regains", claims.is_better, points, damaged="baseline")


DAMAGE = [
    change(at(8, "max"), FP32, -1, 0, 1),
    change(at(6, "max"), FP32, -9, -7, -5.5),
    change(at(5, "max"), FP32, -80, -70, -60),
    change(at(8, "mse"), at(8, "max"), -2, -1, -0.1),
    change(at(6, "mse"), at(6, "max"), 1, 5, 9),
    change(at(5, "mse"), at(5, "max"), -9, -7, -6),
]


def test_a_remedy_is_judged_where_the_plain_variant_begins_to_lose():
    rows = measured(*DAMAGE)
    finding = remedy(8, 6, 5).judge(rows, "prompt accuracy", 5.0)
    assert (finding.comparison.label, finding.verdict) == ("6", HOLDS)
    # The order of the points, points without damage and points with more damage change nothing.
    for bits in ((6,), (5, 6, 8), (6, 5), (8, 6)):
        assert remedy(*bits).judge(rows, "prompt accuracy", 5.0) == finding
    assert remedy(5).judge(rows, "prompt accuracy", 5.0).verdict == FAILS
    # The general tolerance, or one of the statement's own, says what a loss is.
    assert remedy(8, 6, 5).judge(rows, "prompt accuracy", 10.0).comparison.label == "5"
    own = dataclasses.replace(remedy(8, 6, 5), tolerance=10.0)
    assert own.judge(rows, "prompt accuracy", 5.0).comparison.label == "5"


def test_where_the_plain_variant_loses_nothing_there_is_no_room():
    rows = measured(*DAMAGE)
    finding = remedy(8).judge(rows, "prompt accuracy", 5.0)
    assert (str(finding), finding.verdict) == ("8: -1.0 [-2.0, -0.1]", NO_ROOM)
    # A loss that is not certain is none.
    uncertain = measured(change(at(6, "max"), FP32, -9, -7, -4.5), DAMAGE[4])
    assert remedy(8, 6).judge(uncertain, "prompt accuracy", 5.0).verdict == NO_ROOM
    assert remedy(4).judge(rows, "prompt accuracy", 5.0).verdict == MISSING


def test_a_statement_about_damage_needs_no_room():
    # Weights of as many bits cost less; without any damage that is not so.
    def harm(*bits):
        points = [Comparison(f"{b}", "01_quantization", at(b, "max"), at(b, "weights_only")) for b in bits]
        return Statement("activations cost more", claims.is_worse, points, damaged="variant")

    weights = [change(at(b, "weights_only"), FP32, -2, -1, 0) for b in (8, 6)]
    rows = measured(*DAMAGE[:3], *weights)
    assert harm(8).judge(rows, "prompt accuracy", 5.0).verdict == FAILS
    finding = harm(8, 6).judge(rows, "prompt accuracy", 3.0)
    assert (finding.comparison.label, finding.verdict, finding.row["value"]) == ("6", HOLDS, -6)


def test_the_published_point_decides_and_the_others_are_shown():
    points = [Comparison(f"{b}", "01_quantization", at(b, "max")) for b in (8, 6, 5)]
    statement, rows = Statement("costs nothing", claims.not_worse, points), measured(*DAMAGE)
    finding = statement.judge(rows, "prompt accuracy", 5.0)
    assert (finding.comparison.label, finding.verdict) == ("8", HOLDS)
    others = statement.others(rows, "prompt accuracy", finding.comparison)
    assert [(str(other), other.verdict) for other in others] == [
        ("6: -7.0 [-9.0, -5.5]", ""),
        ("5: -70.0 [-80.0, -60.0]", ""),
    ]
    claim = Claim("both", [], [statement, remedy(8)])
    assert claim.judge(rows, "prompt accuracy", 5.0)[0] == IN_PART


def test_metrics_stand_side_by_side():
    pair = at(6, "mse"), at(6, "max")
    rows = measured(change(*pair, -1, 0, 1))
    for metric, low, high in (
        ("CLIP score", 1, 3),
        ("KID", 1, 3),
        ("SSIM", -3, -1),
        ("squared error", -3, -1),
    ):
        rows += [{**rows[0], "metric": f"{metric} difference", "ci_low": low, "ci_high": high}]
    finding = remedy(6).judge([*rows, *measured(DAMAGE[1])], "prompt accuracy", 5.0)
    found = claims.side_by_side(finding, rows)
    assert {metric: sign for metric, (_, sign) in found.items()} == {
        "prompt accuracy": 0, "CLIP score": 1, "KID": -1, "SSIM": -1, "squared error": 1,
    }  # fmt: skip
    assert found["CLIP score"][0]["ci_high"] == 3
    assert claims.disagree(finding, rows) and not claims.disagree(finding, rows[:1])


def test_a_verdict_is_told_with_where_it_was_decided():
    rows = measured(*DAMAGE)
    statement = remedy(8, 6, 5)
    finding = statement.judge(rows, "prompt accuracy", 5.0)
    assert claims.told(statement, finding, rows) == "mse regains: holds (at 6)"
    assert claims.told(remedy(6), finding, rows) == "mse regains: holds"
    other = [{**row, "metric": "CLIP score difference", "ci_low": -1, "ci_high": 1} for row in rows]
    assert claims.told(statement, finding, rows + other) == "mse regains: holds (at 6, metrics disagree)"


def test_a_trend_is_the_line_through_all_amounts():
    amounts, ratios = np.array([0.1, 0.25, 0.45]), np.array([1.0, 0.98, 0.97])
    halves = np.array([0.01, 0.005, 0.02])
    rows = measured(
        *(
            change(pruned("unstructured", a), FP32, r - h, r, r + h)
            for a, r, h in zip(amounts, ratios, halves, strict=True)
        ),
        change(pruned("removed", 0.45), FP32, 0.5, 0.6, 0.7),
        change(Variant("unstructured", 0.2, scope="global"), FP32, 0.5, 0.6, 0.7),
    )
    rows = [{**row, "metric": "time relative to fp32"} for row in rows]
    row = Trend("at 40%", "01_quantization", pruned("unstructured", 0.4)).find(rows, "")
    line, *_ = np.linalg.lstsq(amounts[:, None], 100 * (ratios - 1))
    assert row["value"] == pytest.approx(0.4 * line[0])
    # New draws of the three times move the line by as much as its interval says.
    drawn = 100 * (ratios - 1) + 100 * halves / 1.96 * np.random.default_rng(0).standard_normal((4000, 3))
    lines = 0.4 * np.linalg.lstsq(amounts[:, None], drawn.T)[0][0]
    assert np.percentile(lines, [2.5, 97.5]) == pytest.approx([row["ci_low"], row["ci_high"]], abs=0.05)
    assert Trend("", "01_quantization", pruned("masked channels", 0.4)).find(rows, "") is None
    # A range of few times is no interval.
    for n in (1, 5):
        few = {"variant": pruned("unstructured", 0.5), "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": n}
        more = [*rows, {**rows[-1], **few}]
        assert Trend("at 40%", "01_quantization", pruned("unstructured", 0.4)).find(more, "") == row
        assert Trend("", "01_quantization", pruned("unstructured", 0.4)).find(more[-1:], "") is None


def test_variants_never_compared_directly_differ_as_if_independent(tmp_path):
    report(
        tmp_path,
        "01_quantization",
        change(at(8, "mse"), FP32, 7, 10, 14),
        change(at(8, "timestep_mse", 10), FP32, 1, 4, 8),
        change(at(8, "timestep_mse", 5), FP32, 50, 60, 70),
    )
    about = {"report": "01_quantization", "baseline": at(8, "mse")}
    comparison = Comparison("8", variant=at(8, "timestep_mse", 10), **about)
    row = comparison.find(read_reports(tmp_path, "data/tiny"), "prompt accuracy")
    # 4 less 10; half-widths of 3 and 4 make 5.
    assert (row["value"], row["ci_low"], row["ci_high"]) == (-6, -11, -1)
    assert (row["n"], row["baseline"]) == (256, "mse W8A8")
    assert claims.show(row).endswith("]*")


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
                expected["02_pruning", pruned(method, amount), None, metric] = float(value)
    for amount, line in zip((0.0, 0.2, 0.4), SECONDS.split(";"), strict=True):
        for component, value in zip(
            ("text encoder", "diffusion", "decoder", "total"), line.split(","), strict=True
        ):
            expected["03_profiling", pruned("unstructured", amount), component, "seconds"] = float(value)
    for entry in EIGHT_BITS.split(","):
        method, pair = entry.split()
        for metric, value in zip(("CLIP score", "FID"), pair.split("/"), strict=True):
            expected["01_quantization", at(8, method), None, metric] = float(value)
    rows = read_rows(ROOT / "data" / "published.csv")
    found = {(r["study"], r["variant"], r["about"].get("component"), r["metric"]): r["value"] for r in rows}
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
    quantization = [
        change(at(8, "weights_only"), FP32, -4, -2, 0),
        *DAMAGE,
        change(at(4, "mse"), FP32, -20, -16, -10),
        change(at(4, "timestep_mse", 10), at(4, "mse"), -30, -24, -18),
        change(at(8, "timestep_mse", 5), at(8, "mse"), 20, 30, 40),
    ]
    report(tmp_path, "01_quantization", *quantization)
    masks = [
        change(pruned("masked channels", 0.05), FP32, -17, -12, -7),
        change(pruned("unstructured", 0.1), FP32, -2, 0, 2),
        change(pruned("unstructured", 0.35), FP32, -1.5, 0.8, 3.2),
        change(pruned("unstructured", 0.4), FP32, -3, 0, 3),
    ]
    report(tmp_path, "02_pruning", *masks)
    verdicts = judged(tmp_path)
    assert list(verdicts.values()) == [
        HOLDS, FAILS, HOLDS, MISSING, FAILS, IN_PART, HOLDS, MISSING, MISSING,
    ]  # fmt: skip

    # The same cells, after other runs.
    quantization[0] = change(at(8, "weights_only"), FP32, -20, -15, -10)
    quantization[8] = change(at(4, "timestep_mse", 10), at(4, "mse"), 6, 7, 8)
    report(tmp_path, "01_quantization", *quantization, change(at(6, "weights_only"), FP32, -1, 0, 1))
    masks[1] = change(pruned("unstructured", 0.1), FP32, -14, -11, -8)
    report(tmp_path, "02_pruning", *masks)
    sweet_spot = quantized("timestep_mse", 8, 8, 10, of=pruned("unstructured", 0.2))
    report(tmp_path, "04_combined", change(sweet_spot, FP32, -4, -3, 3))
    times = {"metric": "time relative to fp32", "unit": "x"}
    times = [
        {**change(pruned("unstructured", amount), FP32, 0.94, 0.95, 0.96), **times} for amount in (0.1, 0.7)
    ]
    report(tmp_path, "03_profiling", *times)
    assert list(judged(tmp_path).values()) == [
        FAILS, IN_PART, HOLDS, MISSING, HOLDS, IN_PART, IN_PART, HOLDS, IN_PART,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every row of every report."""
    return read_reports(ROOT / "reports", "data/tiny")


def judged_rows(rows: list[dict]) -> list[dict]:
    """The rows of the report of claims that have an interval."""
    return [row for row in rows if row["report"] == "05_claims" and not math.isnan(row["ci_low"])]


def test_each_row_of_the_report_is_one_of_another_report_or_a_difference_of_two(rows):
    others = {(row["report"], row["variant"], row["metric"], row["baseline"]): row for row in rows}
    by_label = {row["label"]: row["variant"] for row in rows}
    own = judged_rows(rows)
    assert len(own) > 10
    for row in own:
        study, variant, metric = row["about"]["report"], row["variant"], row["metric"]
        source = others.get((study, variant, metric, row["baseline"]))
        if row["about"]["source"] == "trend":
            # The line through all amounts, which is no row of its own.
            assert source is None or source["value"] != row["value"]
            assert variant.pruning == "unstructured" and metric == "time relative to fp32"
            continue
        if row["about"]["source"] == "paired":
            assert all(row[name] == source[name] for name in ("value", "ci_low", "ci_high", "n"))
            continue
        assert source is None
        a, b = (others[study, v, metric, "fp32"]["value"] for v in (variant, by_label[row["baseline"]]))
        assert row["value"] == pytest.approx(a - b, rel=1e-5, abs=1e-4)


TRIPLE = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")


def untraced(html: str, rows: list[dict]) -> list[tuple]:
    """Each "value [low, high]" of the table of claims that is not the report's at its place."""
    own, shown = judged_rows(rows), TRIPLE.findall(html)
    return [
        (numbers, row)
        for numbers, row in zip_longest(shown, own)
        if not numbers
        or not row
        or numbers
        != tuple(
            f"{row[name]:.{len(numbers[0].partition('.')[2])}f}" for name in ("value", "ci_low", "ci_high")
        )
    ]


def shown(containing: str) -> str:
    """What the notebook's cell shows, as it is committed."""
    (cell,) = (cell for cell in code_cells() if containing in cell.source)
    return next(output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {}))


def test_each_number_of_the_table_is_a_row_of_the_report(rows):
    html = shown("to_html")
    assert untraced(html, rows) == [], "run the full profile, then `make goldens`"
    for number in [match.span(i) for match in TRIPLE.finditer(html) for i in (1, 2, 3)]:
        for place in (i for i in range(*number) if html[i].isdigit()):
            changed = html[:place] + str((int(html[place]) + 1) % 10) + html[place + 1 :]
            assert len(untraced(changed, rows)) == 1, html[place - 20 : place + 20]


def test_each_number_about_few_images_is_a_row_of_a_report(rows):
    cells = re.findall(r"<td>(.*?)</td>", shown("few_images(n_images)"))
    found = {(row["report"], row["metric"], row["variant"]): row for row in rows if not row["about"]}
    expected = []
    for (report, metric, variant), row in found.items():
        if (report, metric) != ("05_claims", "half of the interval"):
            continue
        change = found["02_pruning", "prompt accuracy difference", variant]
        expected += [change["value"], change["n"], row["value"]]
        assert row["value"] == pytest.approx((change["ci_high"] - change["ci_low"]) / 2, abs=1e-3)
    assert len(cells) > 10 and cells == [f"{number:.1f}" for number in expected]


def test_the_answer_is_that_of_the_report():
    record = json.loads((ROOT / "reports" / "05_claims" / "run.json").read_text(encoding="utf-8"))
    question = nbformat.read(NOTEBOOK, as_version=4).cells[0].source
    answers = []
    for verdict in claims.VERDICTS:
        texts = [text for text, found in record["verdicts"].items() if found == verdict]
        answers += [f"- **{verdict}**: {'; '.join(texts)}"] if texts else []
        said = [text for found in record["parts"].values() for text, here in found.items() if here == verdict]
        cells = re.findall(f">{verdict}</td>", shown("to_html"))
        # What was not measured says so in two columns.
        times = 2 if verdict == MISSING else 1
        assert len(cells) == len(texts) + times * len(said), "run `make goldens`"
    assert [line for line in question.splitlines() if line.startswith("- **")] == answers
