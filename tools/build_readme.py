"""Rewrite tables and numbers of README.md and data/README.md from reports and files: nobody retypes one.

python tools/build_readme.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A number stands in its line, after one of

    <!-- value: 02_pruning; unstructured; prompt accuracy difference; amount=0.3; .1f -->0.5<!-- end -->
    <!-- interval: 02_pruning; unstructured; prompt accuracy difference; amount=0.3; .1f -->...<!-- end -->
    <!-- value: benchmarks/loading; load_s; case=model.safetensors, dtype=float32, loader=sdcomp; .2f -->...

which name its report, method, metric, parameters (or its file, column and row) and how it is written. The
method of a direct comparison is "mse less max".
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _read(name: str) -> list[dict]:
    with open(ROOT / "reports" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def _rows(study: str) -> list[dict]:
    rows = [{**row, "parameters": json.loads(row["parameters"])} for row in _read(f"{study}/metrics")]
    variants = {row["method"] for row in rows if row["baseline"]}
    for row in rows:
        if row["baseline"] in variants:
            row["method"] += f" less {row['baseline']}"
    return rows


def _find(rows: list[dict], method: str, metric: str, **parameters: object) -> dict:
    return _only(
        [
            r
            for r in rows
            if r["method"] == method
            and r["metric"] == metric
            and all(r["parameters"].get(k) == v for k, v in parameters.items())
        ],
        f"{method}; {metric}; {parameters}",
    )


def _only(rows: list[dict], about: str) -> dict:
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows fit {about!r}: name one by its parameters")
    return rows[0]


def _show(row: dict, digits: int = 1) -> str:
    return _format(row, f".{digits}f", interval=bool(row["ci_low"]))


def _format(row: dict, form: str, interval: bool) -> str:
    value, *ends = (format(float(row[name]), form) for name in ("value", "ci_low", "ci_high") if row[name])
    return f"{value} [{', '.join(ends)}]" if interval else value


def number(kind: str, about: str) -> str:
    """A number (`kind` "value", or "interval" with its 95 % interval) by what its mark says it is about.

    Raises ValueError where not exactly one row fits.
    """
    where, *names, which, form = about.split("; ")
    pairs = dict(pair.split("=", 1) for pair in which.split(", ") if pair)
    if len(names) == 2:
        parameters = {name: json.loads(value) for name, value in pairs.items()}
        return _format(_find(_rows(where), *names, **parameters), form, kind == "interval")
    row = _only([row for row in _read(where) if pairs.items() <= row.items()], about)
    return format(float(row[names[0]]), form)


def base_model_table() -> str:
    """The base model's quality: what was measured, with interval and n."""
    rows = _rows("00_base_model")
    lines = ["| base model, 20 DDIM steps | value [95 % interval] | images | scenes |", "|---|---|---|---|"]

    def add(label: str, method: str, metric: str, digits: int = 1, **which: object) -> None:
        row = _find(rows, method, metric, **which)
        unit = f" {row['unit']}" if row["unit"] in ("%", "dB", "images/s") else ""
        generated = "objects" in which
        distinct = _show(_find(rows, "generated", "distinct scenes", **which), 0) if generated else ""
        lines.append(f"| {label} | {_show(row, digits)}{unit} | {row['n']} | {distinct} |")

    for split, which in (("test", "held-out scenes"), ("unseen", "combinations never seen")):
        for objects, words in ((1, "one object"), (2, "two objects")):
            key = {"split": split, "objects": objects}
            add(f"prompt accuracy, {words}, {which}", "generated", "prompt accuracy", **key)
    for objects, words in ((1, "one object"), (2, "two objects")):
        key = {"split": "test", "objects": objects}
        add(f"CLIP score, {words}", "generated", "CLIP score", **key)
        add(f"CLIP score less that of rendered scenes, {words}", "generated", "CLIP score difference", **key)
    add("autoencoder round trip, PSNR", "autoencoder", "PSNR of the round trip", split="test")
    for method in ("reader on rendered scenes", "reader after the round trip"):
        add(f"{method}, all attributes right", method, "all attributes right", split="test")
    for images in ("noise", "plain backgrounds"):
        add(f"reader cannot tell anything, {images}", "reader", "cannot tell anything", images=images)
    add("generation, 2 CPU cores, batch 16, guidance", "generation", "speed")
    return "\n".join(lines)


def results_table() -> str:
    """What each way of compressing the base model's UNet does to its images, at chosen points."""
    quantized, pruned = _rows("01_quantization"), _rows("02_pruning")
    columns = (
        "UNet",
        "prompt accuracy (%)",
        "difference, paired",
        "CLIP score, difference",
        "PSNR (dB)",
        "images",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]

    def add(label: str, rows: list[dict], method: str, **which: object) -> None:
        accuracy = _find(rows, method, "prompt accuracy", **which)
        others = ["", "", ""]
        if which:
            metrics = ("prompt accuracy difference", "CLIP score difference", "PSNR")
            others = [_show(_find(rows, method, metric, **which)) for metric in metrics]
        lines.append(f"| {label} | {_show(accuracy)} | {' | '.join(others)} | {accuracy['n']} |")

    add("as it is", quantized, "full precision")
    for bits in (8, 6):
        add(f"weights {bits} bits", quantized, "weights_only", weight_bits=bits, act_bits=32)
        which = {"weight_bits": bits, "act_bits": bits}
        add(f"weights and activations {bits} bits, `max`", quantized, "max", **which)
        key = {"k": 10, **which}
        add("the same, `mse` in 10 timestep intervals", quantized, "timestep_mse", **key)
    for amount in (0.3, 0.5):
        add(f"{amount:.0%} of weights zeroed", pruned, "unstructured", amount=amount)
    for amount in (0.05, 0.1):
        add(f"{amount:.0%} of channels zeroed", pruned, "masked channels", amount=amount)
    for method, label in (("removed", "taken out"), ("removed, recovered", "taken out, recovered")):
        add(f"25% of channels and heads {label}", pruned, method, amount=0.25)
    both, combined = {"weight_bits": 8, "act_bits": 8, "k": 10}, _rows("04_combined")
    label = "20% of weights zeroed and 8 bits, `mse` in 10 timestep intervals"
    add(label, combined, "unstructured + timestep_mse", amount=0.2, **both)
    add("10% of channels and heads taken out, int8", combined, "removed + int8", amount=0.1, **both)
    recovered = {"amount": 0.25, "recover_steps": 400, **both}
    add("25% taken out, recovered, int8", combined, "removed, recovered + int8", **recovered)
    return "\n".join(lines)


def times_table() -> str:
    """Where the time goes, and what each way of compressing saves of it."""
    profiled = _rows("03_profiling")
    parts = ("text encoder", "UNet", "decoder", "total")
    columns = ("", *(f"{part} (s)" for part in parts), "UNet call, relative", "weights (MB)")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, method, amount in (
        ("fp32", "fp32", 0.0),
        ("45 % of weights zeroed", "masked", 0.45),
        ("45 % taken out", "removed", 0.45),
        ("8 bits simulated", "simulated", 0.0),
        ("int8", "int8", 0.0),
        ("45 % taken out, int8", "removed + int8", 0.45),
    ):
        cells = [_show(_find(profiled, method, "time", amount=amount, component=part), 3) for part in parts]
        same = method == "fp32"
        ratio = "1" if same else _show(_find(profiled, method, "time relative to fp32", amount=amount), 2)
        weights = _show(_find(profiled, method, "UNet weights", amount=amount))
        lines.append(f"| {label} | {' | '.join(cells)} | {ratio} | {weights} |")
    return "\n".join(lines)


def file_table() -> str:
    """Size and sha256 of the base model's files."""
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    files = (ROOT / "data" / "tiny").iterdir()
    for path in sorted(file for file in files if file.suffix in (".safetensors", ".json", ".txt")):
        content = path.read_bytes()
        lines.append(f"| `{path.name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |")
    return "\n".join(lines)


def claims_table() -> str:
    """What was published, and whether it holds here."""
    record = json.loads((ROOT / "reports" / "05_claims" / "run.json").read_text(encoding="utf-8"))
    lines = ["| published, on Stable Diffusion 1.5 | on the base model | part by part |", "|---|---|---|"]
    verdicts, parts = record["verdicts"], record["parts"]
    return "\n".join(lines + [f"| {claim} | {verdicts[claim]} | {parts[claim]} |" for claim in verdicts])


def _benchmark(name: str, columns: dict[str, tuple[str, str]], of: str = "") -> str:
    """Rows of a benchmark's file, those with a value in `of`: heading -> (column or "low..high", format)."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in _read(f"benchmarks/{name}"):
        if not of or row[of]:
            cells = [_cell(row, column, form) for column, form in columns.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict, column: str, form: str) -> str:
    values = [row[name] for name in column.split("..")]
    if not any(values):
        return ""
    return " to ".join(format(float(value), form) if value and form else value for value in values)


def loading_table() -> str:
    """Loading Stable Diffusion 1.5 here and in diffusers."""
    columns = {
        "file": ("case", ""), "as": ("dtype", ""), "with": ("loader", ""), "loaded in (s)": ("load_s", ".2f"),
        "range (s)": ("load_low..load_high", ".2f"), "and read through (s)": ("read_s", ".2f"),
        "peak anonymous memory (GB)": ("peak_GB", ".2f"), "loads": ("n", ""),
    }  # fmt: skip
    return _benchmark("loading", columns, of="load_s")


def steps_table() -> str:
    """A guided step of Stable Diffusion 1.5's UNet here and in diffusers."""
    columns = {
        "type": ("dtype", ""), "with": ("loader", ""), "step (s)": ("step_s", ".2f"),
        "range": ("step_low..step_high", ".2f"), "largest difference": ("max_difference", ".1e"),
        "steps": ("n", ""),
    }  # fmt: skip
    return _benchmark("steps", columns)


def quantization_table(model: str) -> str:
    """Cost of simulated quantization."""
    columns = {
        "": ("kind", ""), "method": ("method", ""), "quantizes": ("quantizes", ""),
        "seconds": ("seconds", ".2f"), "relative": ("ratio", ".2f"),
        "range": ("ratio_low..ratio_high", ".2f"), "n": ("repeats", ""),
    }  # fmt: skip
    return _benchmark(f"quantization_{model}", columns)


def pruning_table() -> str:
    """Cost of pruning."""
    columns = {
        "what is pruned": ("kind", ""), "with": ("method", ""), "seconds": ("seconds", ".1f"),
        "peak memory beyond the UNet (MiB)": ("extra_peak_MiB", ".0f"), "not zero": ("nonzero", ",.0f"),
        "note": ("failed", ""),
    }  # fmt: skip
    return _benchmark("pruning_sd15", columns)


def removal_table() -> str:
    """Gain of removal in time."""
    columns = {
        "method": ("method", ""), "amount": ("amount", ""), "parameters": ("parameters", ",.0f"),
        "MACs saved": ("macs_saved", ".1%"), "time saved": ("time_saved", ".1%"),
        "steps (s)": ("step_whole_s..step_smaller_s", ".2f"),
        "share of time / share of MACs": ("time_saved_per_macs_saved", ".2f"), "n": ("repeats", ".0f"),
    }  # fmt: skip
    return _benchmark("removal_sd15", columns)


def removal_quality_table() -> str:
    """Images after removal."""
    columns = {
        "method": ("method", ""), "amount": ("amount", ""), "MACs left": ("macs", ".0%"),
        "parameters": ("parameters", ",.0f"), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to the whole": ("difference", ".1f"),
        "95 % interval": ("difference_low..difference_high", ".1f"),
        "less Torch-Pruning at": ("beside", ""), "advantage": ("advantage", ".1f"),
        "its 95 % interval": ("advantage_low..advantage_high", ".1f"),
    }  # fmt: skip
    return _benchmark("removal_base", columns)


def int8_table(model: str) -> str:
    """One UNet step in integers, here and elsewhere."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".3f"), "speed, fp32 = 1": ("speedup", ".2f"),
        "interval": ("speedup_low..speedup_high", ".2f"), "peak memory (GiB)": ("peak_gib", ".2f"),
        "n": ("n", ".0f"), "note": ("note", ""),
    }  # fmt: skip
    return _benchmark(f"int8_{model}", columns)


def int8_where_table() -> str:
    """What a step in integers spends its time in."""
    columns = {"kind of operation": ("kind", ""), "seconds": ("seconds", ".2f"), "share": ("share", ".0%")}
    return _benchmark("int8_sd15_where", columns)


TABLES = {
    "int8, where": int8_where_table,
    "pruning": pruning_table,
    "removal": removal_table,
    "images after removal": removal_quality_table,
    "int8, base": lambda: int8_table("base"),
    "int8, SD 1.5": lambda: int8_table("sd15"),
    "loading": loading_table,
    "steps": steps_table,
    "quantization, base": lambda: quantization_table("base"),
    "quantization, SD 1.5": lambda: quantization_table("sd15"),
    "base model": base_model_table,
    "results": results_table,
    "times": times_table,
    "claims": claims_table,
    "files": file_table,
}
PAGES = tuple(ROOT / folder / "README.md" for folder in ("", "data", "reports/benchmarks"))


def build(text: str) -> str:
    """A page with all between two marks made anew. Raises KeyError for an unknown table."""
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


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(build(page.read_text(encoding="utf-8")), encoding="utf-8")
