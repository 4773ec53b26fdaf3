"""The README and the committed notebooks keep their promises."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from sdcomp.study import FP32, Variant, quantized
from sdcomp.study.results import COLUMNS, columns

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_and_numbers_are_those_of_the_reports():
    builder = _load(ROOT / "tools" / "build_readme.py")
    pages = builder.built_pages()
    assert {ROOT / "README.md", *NOTEBOOKS} < pages.keys()
    for path, text in pages.items():
        is_now = path.read_text(encoding="utf-8")
        assert is_now == text, f"run tools/build_readme.py: {path} is out of date"


# A number in the README is a result if it is a decimal or has a unit.
NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+|(?= ?(?:%|x\b|×|points?\b|dB\b|[kMG]i?B\b|m?s\b|"
    r"seconds?\b|minutes?\b|hours?\b|times\b|images\b|prompts\b)))"
)
MARK = (
    "<!-- interval: 02_pruning; unstructured 30 %; prompt accuracy difference; ; .1f -->"
    "0.0 [0.0, 0.0]<!-- end -->"
)
MARKED = r"<!-- (?:value|interval): (.*?) -->(.*?)<!-- end -->"
NO_RESULTS = {
    "95 % interval": "what a bracket is",
    "Stable Diffusion 1.5": "a name",
    "Python 3.11": "a version",
    "1.7 GB": "what the first run installs",
}


def typed_results(page: str) -> list[str]:
    """The results in prose that are not marked. An amount of pruning that a mark beside it names is none."""
    for made in (r"```.*?```", r"<!-- table: .*?<!-- end -->"):
        page = re.sub(made, "", page, flags=re.DOTALL)
    found = []
    for paragraph in page.splitlines():
        amounts = re.findall(r"<!-- [^>]*? ([\d.]+) %[;,]", paragraph)
        known = [*NO_RESULTS, *(f"{amount}{space}%" for amount in amounts for space in ("", " "))]
        prose = re.sub(rf"{MARKED}|`[^`]*`|\]\([^)]*\)", " ", paragraph)
        for words in known:
            prose = prose.replace(words, " ")
        found += NUMBER.findall(prose)
    return found


def test_the_first_screen_shows_the_result():
    """One sentence, one figure, a table of at most six rows, what its score is, and the two commands."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    screen = lines[:25]
    table = [line for line in screen if line.startswith("| ")]
    assert 2 <= len(table) <= 1 + 6 and all("[" in line for line in table[2:])
    assert sum(line.startswith("![") for line in screen) == 1
    assert len([line for line in screen if line.startswith("*Prompt accuracy* is")]) == 1
    assert [line.split("  ")[0] for line in screen if line.startswith("make")] == ["make study", "make test"]
    paragraphs = (line for line in lines if not line.startswith(("|", "<!--")))
    assert max(len(re.sub(r"<!--.*?-->", "", line)) for line in paragraphs) < 600


def test_no_result_in_the_readme_is_typed_by_hand():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert typed_results(readme) == [], "write them as tools/build_readme.py says"
    assert [words for words in NO_RESULTS if words not in readme] == []


@pytest.mark.parametrize(
    ("sentence", "typed"),
    [
        ("At 6 bits it loses 2.6 points ([-5.4, 0.0]).", ["2.6", "-5.4", "0.0"]),
        ("It is 3 x faster and 19% smaller, in 12 minutes, on 1,024 images.", ["3", "19", "12", "1,024"]),
        ("On 2 cores, 64x64 images in 20 steps with Stable Diffusion 1.5; see `x == 0.5`.", []),
        (f"Zeroing 30 % costs {MARK} points.", []),
        (f"Zeroing 30 % costs {MARK} points, 40 % more.", ["40"]),
    ],
)
def test_a_typed_result_is_noticed(sentence, typed):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert typed_results(f"{readme}\n{sentence}\n") == typed


INTERVAL = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")


def test_each_interval_in_the_readme_is_a_row_of_a_report():
    """Found in the files themselves, without the builder. What other tools lose stands in a benchmark."""
    rows = []
    for path in sorted(ROOT.glob("reports/*/metrics.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            rows += [row for row in csv.DictReader(file) if row["ci_low"]]
    intervals = INTERVAL.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    written = {
        tuple(f"{float(row[name]):z.{digits}f}" for name in ("value", "ci_low", "ci_high"))
        for row in rows
        for digits in range(4)
    }
    with open(ROOT / "reports" / "benchmarks" / "low_bits.csv", newline="", encoding="utf-8") as file:
        written |= {(row["accuracy_difference"], row["low"], row["high"]) for row in csv.DictReader(file)}
    assert len(intervals) > 30 and [numbers for numbers in intervals if numbers not in written] == []


def test_a_changed_digit_in_the_readme_is_noticed():
    builder = _load(ROOT / "tools" / "build_readme.py")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = f"{readme}\nZeroing 30 % costs {MARK} points.\n"
    built = builder.build(page)
    assert builder.build(built) == built
    made = re.compile(rf"{MARKED}|<!-- table: results -->.*?<!-- end -->", flags=re.DOTALL)
    comments = {i for match in re.finditer("<!--.*?-->", built) for i in range(*match.span())}
    places = {i for match in made.finditer(built) for i in range(*match.span()) if built[i].isdigit()}
    generated = sorted(places - comments)
    assert len(generated) > 200
    for i in generated[:: len(generated) // 20]:
        changed = built[:i] + str((int(built[i]) + 1) % 10) + built[i + 1 :]
        assert builder.build(changed) == built != changed


@pytest.mark.parametrize(
    "mark",
    [
        "02_pruning; unstructured 31 %; prompt accuracy difference; ; .1f",
        "02_pruning; unstructured; prompt accuracy difference; ; .1f",
        "02_pruning; unstructured 30 %; noise MSE at timestep; ; .1f",
        "03_profiling; fp32; time; component=vae; .1f",
        "benchmarks/loading; load_s; dtype=float32; .1f",
    ],
)
def test_a_mark_that_names_no_row_or_several_is_an_error(mark):
    builder = _load(ROOT / "tools" / "build_readme.py")
    with pytest.raises(ValueError, match="rows fit"):
        builder.build(f"<!-- value: {mark} -->1<!-- end -->")


def test_direct_comparisons_have_names_of_their_own(tmp_path):
    """The difference of a variant to the baseline is not taken for its difference to another variant."""
    builder = _load(ROOT / "tools" / "build_readme.py")
    builder.ROOT = tmp_path
    folder = tmp_path / "reports" / "01_quantization"
    folder.mkdir(parents=True)
    largest, mse = quantized("max", 6, 6), quantized("mse", 6, 6)
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for variant, baseline, value in ((largest, FP32, -3), (mse, FP32, -1), (mse, largest, 2)):
            row = {"metric": "change", "value": value, "baseline": baseline.label}
            writer.writerow(row | columns(variant, {}))
    assert builder.number("value", "01_quantization; mse W6A6; change; ; .0f") == "-1"
    assert builder.number("value", "01_quantization; mse W6A6 less max W6A6; change; ; .0f") == "2"


def test_the_headline_names_the_files_that_the_report_has(tmp_path):
    builder = _load(ROOT / "tools" / "build_readme.py")
    builder.ROOT = tmp_path
    variants = [variant for _, variant in builder.HEADLINE]
    few, made = Variant(steps=6), {"02_pruning": [(FP32, "file, dense", 20, "")], "04_combined": []}
    rows = made["04_combined"]
    rows += [(FP32, "prompt accuracy", 90, ""), (FP32, "UNet time of an image", 0.4, "")]
    for i, variant in enumerate([*variants, few]):
        rows += [
            (variant, f"{score} difference", -0.5, "fp32") for score in ("prompt accuracy", "CLIP score")
        ]
        rows += [(variant, "time relative to fp32", 0.8, "fp32"), (variant, "UNet time of an image", 0.3, "")]
        rows += [] if variant == few else [(replace(variant, steps=0), "UNet file", 10 - i, "")]
    for study, found in made.items():
        folder = tmp_path / "reports" / study
        folder.mkdir(parents=True)
        with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            for variant, metric, value, baseline in found:
                ends = {"ci_low": value - 1, "ci_high": value + 1, "n": 256, "baseline": baseline}
                writer.writerow({"metric": metric, "value": value} | ends | columns(variant, {}))
    lines = builder.headline_table().splitlines()
    assert len(lines) == 2 + 1 + 5
    assert lines[2] == "| as it is, fp16 file (accuracy 90.0 %) | 20.0 |  |  | 1 |"
    assert lines[6].startswith(
        "| 60 % of parameters removed by second order, 3 bits in groups, packed | 7.0 (35 %) | -0.5 [-1.5,"
    )
    assert lines[7].startswith(
        "| 60 % of parameters removed by second order, int8, 6 steps | 6.0 (30 %) | -0.5 [-1.5,"
    )
    smallest, quickest, alone, peer = builder.headline_answer().splitlines()
    assert smallest.startswith("- Of 5 files, the smallest") and "7.00 MB, 35 % of fp16" in smallest
    assert "0.300 s of UNet time an image: 1.3 times" in quickest and "fp32, 6 steps" in alone
    assert "models that other tools make, the smallest" in peer


def test_the_smallest_peer_is_within_the_limits(monkeypatch):
    tables = _load(ROOT / "tools" / "benchmark_tables.py")
    names = ("variant", "accuracy_difference", "low", "high", "megabytes")
    rows = [
        ("sdcomp W2", "0.0", "-1.0", "1.0", "1"), ("far W2", "-2.1", "-3.0", "0.0", "2"),
        ("wide W3", "-1.0", "-5.1", "0.0", "3"), ("tie W4", "-2.0", "-4.9", "0.8", "5"),
        ("best W4", "-0.4", "-2.8", "1.9", "5"), ("failed", "", "", "", ""),
    ]  # fmt: skip
    table = [dict(zip(names, row, strict=True)) for row in rows]
    monkeypatch.setattr(tables, "read", lambda name: table)
    assert "Of 5 models" in tables.smallest_peer(0.4, 5.0)
    assert tables.smallest_peer(0.4, 5.0).endswith("at least 5 MB (best W4: -0.4 [-2.8, 1.9]).")
    table[3:] = []
    assert tables.smallest_peer(0.4, 5.0).startswith("Of 2 models that other tools make, none")


def test_benchmark_tables_show_intervals_and_leave_out_empty_columns(monkeypatch):
    tables = _load(ROOT / "tools" / "benchmark_tables.py")
    rows = [
        {"v": "1.234", "low": "1", "high": "2", "note": ""},
        {"v": "", "low": "", "high": "", "note": ""},
    ]
    monkeypatch.setattr(tables, "read", lambda name: rows)
    columns = {"value": ("v[low..high]", ".1f"), "range": ("low..high", ""), "note": ("note", "")}
    shown = tables._benchmark("any", columns).splitlines()
    assert shown == ["| value | range |", "|---|---|", "| 1.2 [1.0, 2.0] | 1 to 2 |", "|  |  |"]


def test_the_coverage_table_and_figure_name_the_worst_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tables = _load(ROOT / "tools" / "benchmark_tables.py")
    figure = _load(ROOT / "tools" / "coverage_figure.py")
    names = ("statistic", "interval", "n", "truth", "coverage_%")
    rows = [
        ("share", "Wilson", "64", "0.5", "94.0"), ("share", "Wilson", "16", "0.5", "92.3"),
        ("share", "bootstrap", "16", "0.02", "27.6"),
        ("paired difference of shares", "bootstrap", "16", "0", "55"),
        ("mean of scores", "bootstrap", "16", "0", "91"), ("KID", "bootstrap", "64", "0", "100"),
    ]  # fmt: skip
    table = [dict(zip(names, row, strict=True)) for row in rows]
    monkeypatch.setattr(tables, "read", lambda name: table)
    assert "| share | Wilson | 92.3 | truth 0.5, 16 images | 94.0 |" in tables.coverage_table()
    said = figure.title(table)
    assert "miss the truth in at most 9 % of cases" in said and "up to 72 %" in said


def test_prompt_sets_are_what_their_script_makes():
    maker = _load(ROOT / "data" / "prompts" / "make_prompts.py")
    for name, drawn in maker.SETS.items():
        path = ROOT / "data" / "prompts" / f"scenes_{name}.jsonl"
        assert path.read_text(encoding="utf-8") == maker.make(*drawn)


def test_what_readme_links_to_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_executed_at_its_defaults_and_without_images(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "papermill" not in notebook.metadata
    assert "image/png" not in json.dumps([cell.outputs for cell in code])
    assert not any(cell.source.startswith("# Parameters") for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_question_then_parameters_then_their_check(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(
        word in cells[0].source for word in ("**Question.**", "**Answer", "**Run time.**", "papermill ")
    )
    assert cells[1].metadata.tags == ["parameters"]
    for line, node in zip(cells[1].source.splitlines(), ast.parse(cells[1].source).body, strict=True):
        ast.literal_eval(node.value)
        assert isinstance(node, ast.AnnAssign)
        assert "  # " in line
    assert f'Run("{path.stem}", globals())' in cells[2].source


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/profiles/*.yaml")), ids=lambda p: p.stem)
def test_profile_only_sets_parameters_that_its_notebook_has(path):
    name = {"published": "01_quantization", "training": "00_base_model"}.get(path.stem, path.stem)
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    known = {node.target.id for node in ast.parse(cells[1].source).body}
    named = set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named and named <= known
