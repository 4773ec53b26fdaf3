"""Rewrite the tables of README.md and data/README.md from reports and files: nobody retypes a number.

python reports/build_readme.py
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _rows(study: str) -> list[dict]:
    with open(ROOT / "reports" / study / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{**row, "parameters": json.loads(row["parameters"])} for row in csv.DictReader(file)]


def _find(rows: list[dict], method: str, metric: str, **parameters: object) -> dict:
    (row,) = (
        r
        for r in rows
        if r["method"] == method
        and r["metric"] == metric
        and all(r["parameters"].get(k) == v for k, v in parameters.items())
    )
    return row


def _show(row: dict, digits: int = 1) -> str:
    text = f"{float(row['value']):.{digits}f}"
    if row["ci_low"]:
        text += f" [{float(row['ci_low']):.{digits}f}, {float(row['ci_high']):.{digits}f}]"
    return text


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
    return "\n".join(lines)


def file_table() -> str:
    """Size and sha256 of the base model's files."""
    lines = ["| file | bytes | sha256 |", "|---|---|---|"]
    files = (ROOT / "data" / "tiny").iterdir()
    for path in sorted(file for file in files if file.suffix in (".safetensors", ".json", ".txt")):
        content = path.read_bytes()
        lines.append(f"| `{path.name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |")
    return "\n".join(lines)


TABLES = {"base model": base_model_table, "results": results_table, "files": file_table}
PAGES = (ROOT / "README.md", ROOT / "data" / "README.md")


def build(text: str) -> str:
    """A page with each table between its two marks made anew. Raises KeyError for an unknown table."""
    return re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(build(page.read_text(encoding="utf-8")), encoding="utf-8")
