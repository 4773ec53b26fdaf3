"""Rewrite the tables and numbers of READMEs and notebooks from reports, so that nobody types one.

python tools/build_readme.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A number stands in its line, after one of

    <!-- value: 02_pruning; unstructured 30 %; prompt accuracy difference; ; .1f -->0.5<!-- end -->
    <!-- interval: 03_profiling; fp32; time; component=UNet; .2f -->0.56 [0.56, 0.57]<!-- end -->
    <!-- value: benchmarks/loading; load_s; case=model.safetensors, loader=sdcomp; .2f -->...

A mark names the report, the label of a variant (`sdcomp.study.Variant.label`), the metric, what else the row
is about, and the format. For a benchmark it names the file, the column, the row and the format. A direct
comparison has the label "mse W6A6 less max W6A6".
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import benchmark_tables
import data_files
import notebook_texts

from sdcomp.study import FP32, Variant, pruned, quantized
from sdcomp.study.answers import LITTLE, TOLERANCES, fastest, repeated, smallest_file
from sdcomp.study.results import Row, read_rows, select

ROOT = Path(__file__).resolve().parents[1]


# Rows


@cache
def _rows(study: str) -> list[Row]:
    rows = read_rows(ROOT / "reports" / study / "metrics.csv")
    for row in rows:
        if row["variant"] and row["baseline"] not in ("", FP32.label):
            row["label"] += f" less {row['baseline']}"
    return rows


def find(study: str, label: str, metric: str, **about: Any) -> Row:
    """The row of a report with this label, metric and nothing else that it is about. One must fit."""
    found = [row for row in _rows(study) if row["label"] == label and row["metric"] == metric]
    return _only([row for row in found if row["about"] == about], f"{study}; {label}; {metric}; {about}")


def _only(rows: list[Any], about: str) -> Any:
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows fit {about!r}: a mark must name one")
    return rows[0]


def _format(row: Row, form: str, interval: bool) -> str:
    value, *ends = (format(row[name], f"z{form}") for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{', '.join(ends)}]" if interval else value


def _show(row: Row, digits: int = 1) -> str:
    return _format(row, f".{digits}f", interval=not math.isnan(row["ci_low"]))


def number(kind: str, about: str) -> str:
    """The number of a mark; `kind` is "value", or "interval" for the number with its 95 % interval.

    Raises ValueError where not exactly one row fits.
    """
    where, *names, which, form = about.split("; ")
    pairs = dict(pair.split("=", 1) for pair in re.split(r", (?=\w+=)", which) if pair)
    if len(names) == 2:
        row = find(where, *names, **{name: _parsed(value) for name, value in pairs.items()})
        return _format(row, form, kind == "interval")
    row = _only([row for row in benchmark_tables.read(where) if pairs.items() <= row.items()], about)
    return benchmark_tables.number(row[names[0]], form)


def _parsed(value: str) -> Any:
    """A number, where the text of a mark is one."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _table(*rows: list[str]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


# Tables

REMOVED = {amount: pruned("removed", amount) for amount in (0.1, 0.25)}
RECOVERED = pruned("removed", 0.25, recover_steps=400)
PUBLISHED = quantized("timestep_mse", 8, 8, 10, of=pruned("unstructured", 0.2))


def _int8(of: Variant = FP32, k: int = 10) -> Variant:
    return quantized("timestep_mse", 8, 8, k, of=of, execution="int8")


def packed(bits: int, of: Variant = FP32) -> Variant:
    """The packed file of a UNet, its weights rounded by second order; in groups below 4 bits."""
    recipe = "weights_gptq" if bits >= 4 else "weights_gptq_groups"
    return quantized(recipe, bits, of=of, execution="packed")


ZEROS = pruned("unstructured", 0.5, scope="global", importance="second_order")
SMALLER = pruned("removed", 0.6, scope="global", importance="second_order")
INT8 = _int8()
HEADLINE = (
    ("int8", INT8),
    ("4-bit weights, packed", packed(4)),
    ("50 % of weights zeroed by second order, 4 bits, packed", packed(4, ZEROS)),
    ("60 % of parameters removed by second order, 3 bits in groups, packed", packed(3, SMALLER)),
    ("60 % of parameters removed by second order, int8, 6 steps", replace(_int8(SMALLER), steps=6)),
)


def headline_table() -> str:
    """The first table: what a real file and a real call cost, and what the images lose."""
    study, half = "04_combined", _fp16_megabytes()
    heads = ["UNet", "file (MB, share of fp16)", "prompt accuracy, difference (points)"]
    rows = [[*heads, "CLIP score, difference", "UNet time (fp32 = 1)"]]
    accuracy = find(study, FP32.label, "prompt accuracy")["value"]
    rows.append([f"as it is, fp16 file (accuracy {accuracy:.1f} %)", f"{half:.1f}", "", "", "1"])
    for label, variant in HEADLINE:
        size = find(study, replace(variant, steps=0).label, "UNet file")["value"]
        scores = (f"{score} difference" for score in ("prompt accuracy", "CLIP score"))
        changes = [_show(find(study, variant.label, change)) for change in scores]
        time = _show(find(study, variant.label, "time relative to fp32"), 2)
        rows.append([label, f"{size:.1f} ({100 * size / half:.0f} %)", *changes, time])
    return _table(*rows)


def headline_answer() -> str:
    """The smallest file and the fastest execution that lose little, with the names of the table."""
    rows = _rows("04_combined")
    found = select(rows, metric="prompt accuracy difference", baseline=FP32.label)
    changes, again = ([row for row in found if bool(row["about"]) == more] for more in (False, True))
    files = {row["variant"]: row["value"] for row in select(rows, metric="UNet file")}
    files = {v: size for v, size in files.items() if v.execution not in ("fp32", "simulated")}
    lines = [smallest_file(changes, files, _fp16_megabytes())]
    seconds = {row["variant"]: row["value"] for row in select(rows, metric="UNet time of an image")}
    lines += fastest(changes, seconds).splitlines() if seconds else []
    lines += [repeated(again)] if again else []
    lines.append(benchmark_tables.smallest_peer(LITTLE, TOLERANCES["prompt accuracy difference"]))
    text = "\n".join(f"- {line}" for line in lines)
    for name, variant in HEADLINE:
        # Whole labels: one may be the end of another.
        text = re.sub(rf"(\(|: |; ){re.escape(variant.label)}:", rf"\g<1>{name}:", text)
    return text


def _fp16_megabytes() -> float:
    return find("02_pruning", FP32.label, "file, dense")["value"]


def results_table() -> str:
    """What each way of compressing the tiny model's UNet does to its images, at chosen points."""
    rows = [
        ["UNet", "prompt accuracy (%)", "paired difference", "CLIP score, difference", "PSNR (dB)", "images"]
    ]

    def add(label: str, study: str, variant: Variant) -> None:
        accuracy = find(study, variant.label, "prompt accuracy")
        metrics = ("prompt accuracy difference", "CLIP score difference", "PSNR")
        others = ["", "", ""]
        if variant != FP32:
            others = [_show(find(study, variant.label, metric)) for metric in metrics]
        rows.append([label, _show(accuracy), *others, f"{accuracy['n']:.0f}"])

    add("as it is", "01_quantization", FP32)
    for bits in (8, 6):
        add(f"weights {bits} bits", "01_quantization", quantized("weights_only", bits))
        add(f"weights and activations {bits} bits, `max`", "01_quantization", quantized("max", bits, bits))
        add("the same, `mse`", "01_quantization", quantized("mse", bits, bits))
        timestep = quantized("timestep_mse", bits, bits, 10)
        add("the same, `mse` in 10 timestep intervals", "01_quantization", timestep)
    for bits in (8, 4):
        label = f"weights 4 bits, activations {bits} bits, `low_bits`"
        add(label, "06_low_bits", quantized("low_bits", 4, bits))
    for amount in (0.3, 0.5):
        add(f"{100 * amount:.0f} % of weights zeroed", "02_pruning", pruned("unstructured", amount))
    alike = pruned("unstructured", 0.5, importance="second_order")
    add("50 % of weights zeroed by second order, of each layer alike", "02_pruning", alike)
    where_cheap = replace(alike, amount=0.8, scope="global")
    add("80 % of weights zeroed by second order", "02_pruning", where_cheap)
    add("5 % of channels zeroed", "02_pruning", pruned("masked channels", 0.05))
    add("25 % of channels and heads removed", "02_pruning", REMOVED[0.25])
    add("the same, recovered", "02_pruning", RECOVERED)
    add("60 % of parameters removed by second order", "02_pruning", SMALLER)
    add("20 % of weights zeroed and 8 bits, `mse` in 10 timestep intervals", "04_combined", PUBLISHED)
    add("25 % of channels and heads removed, recovered, int8", "04_combined", _int8(RECOVERED))
    return _table(*rows)


def times_table() -> str:
    """What each way of compressing saves of a UNet call, and of memory."""
    study = "03_profiling"
    rows = [["", "UNet call (fp32 = 1)", "UNet weights in memory (MB)"]]
    for label, variant in (
        ("fp32", FP32),
        ("40 % of weights zeroed", pruned("unstructured", 0.4)),
        ("25 % of channels and heads removed", REMOVED[0.25]),
        ("60 % of parameters removed by second order", SMALLER),
        ("8 bits simulated", quantized("timestep_mse", 8, 8, 5)),
        ("int8", _int8(k=5)),
        ("60 % of parameters removed by second order, int8", _int8(SMALLER, k=5)),
    ):
        ratio = "1" if variant == FP32 else _show(find(study, variant.label, "time relative to fp32"), 2)
        rows.append([label, ratio, _show(find(study, variant.label, "UNet weights"))])
    return _table(*rows)


def int8_times_table() -> str:
    """The time of the tiny model's UNet in int8, as each report and benchmark measured it."""
    heads = ["measured in", "CPU", "rows of a call", "UNets that take turns"]
    rows = [[*heads, "our kernels, fp32 = 1", "NNCF's on OpenVINO, fp32 = 1", "n"]]
    for study, k in (("03_profiling", 5), ("04_combined", 10)):
        found = find(study, _int8(k=k).label, "time relative to fp32")
        link = f"[{study}](../{study}/{study}.ipynb)"
        rows.append([link, "EPYC", "32", "2 in one process", _show(found, 2), "", f"{found['n']:.0f}"])
    for name, cpu, turns in (
        ("deploy_tiny", "EPYC", "13 processes"),
        ("int8_base", "Xeon", "2 processes"),
        ("int8_runs", "EPYC", "2 processes"),
    ):
        found = benchmark_tables.read(f"benchmarks/{name}")
        ours = [row for row in found if row["variant"] == "sdcomp int8"]
        theirs = [row for row in found if row["variant"] in ("nncf, openvino", "openvino int8")]
        for row, other in zip(ours, theirs, strict=True):
            link = f"[{name}.csv]({name}.csv)" + f", run {row.get('run')}" * ("run" in row)
            rows.append([link, cpu, "16", turns, _time(row), _time(other), row["n"]])
    return _table(*rows)


def _time(row: dict[str, str]) -> str:
    """A speed and its interval, as times."""
    value, high, low = (1 / float(row[key]) for key in ("speedup", "speedup_low", "speedup_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def claims_table() -> str:
    """The published claims, and whether they hold here."""
    record = json.loads((ROOT / "reports" / "05_claims" / "run.json").read_text(encoding="utf-8"))
    rows = [["published, on Stable Diffusion 1.5", "on the tiny model", "statement by statement"]]
    for claim, verdict in record["verdicts"].items():
        rows.append([claim, verdict, "; ".join(record["said"][claim])])
    return _table(*rows)


def verdicts() -> str:
    """The published claims by verdict."""
    record = json.loads((ROOT / "reports" / "05_claims" / "run.json").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for claim, verdict in record["verdicts"].items():
        found.setdefault(verdict, []).append(claim)
    return "\n".join(f"- **{verdict}**: {'; '.join(claims)}" for verdict, claims in found.items())


def tiny_model_table() -> str:
    """The quality of the tiny model, with intervals and n."""
    rows = [["tiny model, 20 DDIM steps", "value [95 % interval]", "images", "scenes"]]

    def add(label: str, subject: str, metric: str, **about: Any) -> None:
        row = find("00_base_model", subject, metric, **about)
        unit = f" {row['unit']}" if row["unit"] in ("%", "dB", "images/s") else ""
        n = "" if math.isnan(row["n"]) else f"{row['n']:.0f}"
        distinct = ""
        if "objects" in about:
            distinct = _show(find("00_base_model", "generated", "distinct scenes", **about), 0)
        rows.append([label, _show(row) + unit, n, distinct])

    for split, which in (("test", "held-out scenes"), ("unseen", "combinations never seen")):
        for objects, words in ((1, "one object"), (2, "two objects")):
            about = {"split": split, "objects": objects}
            add(f"prompt accuracy, {words}, {which}", "generated", "prompt accuracy", **about)
    for objects, words in ((1, "one object"), (2, "two objects")):
        about = {"split": "test", "objects": objects}
        add(f"CLIP score, {words}", "generated", "CLIP score", **about)
        label = f"CLIP score minus that of rendered scenes, {words}"
        add(label, "generated", "CLIP score difference", **about)
    add("autoencoder round trip, PSNR", "autoencoder", "PSNR of the round trip", split="test")
    for subject in ("reader on rendered scenes", "reader after the round trip"):
        add(f"{subject}, all attributes right", subject, "all attributes right", split="test")
    for images in ("noise", "plain backgrounds"):
        add(f"reader cannot tell anything, {images}", "reader", "cannot tell anything", images=images)
    add("generation, 2 CPU cores, batch 16, guidance, one run", "generation", "speed")
    return _table(*rows)


TABLES = {
    "headline": headline_table,
    "headline answer": headline_answer,
    "results": results_table,
    "times": times_table,
    "claims": claims_table,
    "verdicts": verdicts,
    "tiny model": tiny_model_table,
    "files": lambda: _table(*data_files.rows(ROOT / "data" / "tiny")),
    "prompt files": lambda: _table(*data_files.rows(ROOT / "data" / "prompts")),
    "int8, times": int8_times_table,
    **benchmark_tables.TABLES,
}
PAGES = tuple(ROOT / folder / "README.md" for folder in ("", "data", "reports/benchmarks"))


def build(text: str) -> str:
    """The page with everything between two marks made anew. Raises KeyError for an unknown table."""
    text = re.sub(
        r"(<!-- (value|interval): (.*?) -->).*?(<!-- end -->)",
        lambda m: f"{m[1]}{number(m[2], m[3])}{m[4]}",
        text,
    )
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


def built_pages() -> dict[Path, str]:
    """All READMEs and notebooks, as they should be."""
    pages = {page: build(page.read_text(encoding="utf-8")) for page in PAGES}
    return pages | notebook_texts.built(ROOT, build)


if __name__ == "__main__":
    for page, text in built_pages().items():
        page.write_text(text, encoding="utf-8")
