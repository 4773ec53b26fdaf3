"""Tables of reports/benchmarks, from the files that the scripts in tests/benchmarks write."""

from __future__ import annotations

import csv
from pathlib import Path

REPORTS = Path(__file__).resolve().parents[1] / "reports"


def read(name: str) -> list[dict[str, str]]:
    """The rows of `reports/<name>.csv`, as text."""
    with open(REPORTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _benchmark(name: str, columns: dict[str, tuple[str, str]], of: str = "") -> str:
    """A table of a benchmark's file; `columns` maps a heading to a column (or "low..high") and a format.

    Only rows with a value in the column `of` are shown, if that is given.
    """
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in read(f"benchmarks/{name}"):
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
    """Time and memory of loading Stable Diffusion 1.5, here and in diffusers."""
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
    """Images after removal, at equal multiply-accumulates and equal recovery."""
    columns = {
        "method": ("method", ""), "amount": ("amount", ""), "MACs left": ("macs", ".1%"),
        "parameters": ("parameters", ",.0f"), "recovery (steps)": ("recovery_steps", ""),
        "prompt accuracy (%)": ("accuracy", ".1f"), "difference to the whole": ("difference", ".1f"),
        "95 % interval": ("difference_low..difference_high", ".1f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("removal_equal", columns)


def int8_table(model: str) -> str:
    """One UNet step in integers, here and elsewhere."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".3f"), "speed, fp32 = 1": ("speedup", ".2f"),
        "interval": ("speedup_low..speedup_high", ".2f"), "peak memory (GiB)": ("peak_gib", ".2f"),
        "n": ("n", ".0f"), "note": ("note", ""),
    }  # fmt: skip
    return _benchmark(f"int8_{model}", columns)


def int8_where_table() -> str:
    """The time of a step in integers, by kind of operation."""
    columns = {"kind of operation": ("kind", ""), "seconds": ("seconds", ".2f"), "share": ("share", ".0%")}
    return _benchmark("int8_sd15_where", columns)


def deploy_table(model: str) -> str:
    """One UNet step in int8 on several engines, and what it takes to make the models."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".3f"), "speed, fp32 = 1": ("speedup", ".2f"),
        "interval": ("speedup_low..speedup_high", ".2f"), "time, NNCF = 1": ("of_nncf", ".2f"),
        "its interval": ("of_nncf_low..of_nncf_high", ".2f"), "MACs left": ("arithmetic_left", ".1%"),
        "peak memory (GiB)": ("peak_gib", ".2f"), "made in (s)": ("make_seconds", ".0f"),
        "peak memory to make (GiB)": ("make_gib", ".2f"),
        "file (GB)": ("file_gb", ".4f"), "n": ("n", ".0f"), "note": ("note", ""),
    }  # fmt: skip
    return _benchmark(f"deploy_{model}", columns)


def deploy_images_table() -> str:
    """Images of exported UNets beside those of the simulation that they were made of."""
    columns = {
        "engine": ("engine", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to the simulation": ("accuracy_difference", ".1f"),
        "95 % interval": ("low..high", ".1f"), "CLIP score, difference": ("clip_difference", ".2f"),
        "PSNR to the simulation (dB)": ("psnr", ".1f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("deploy_images", columns)


def removal_time_table() -> str:
    """Removal by the time that it saves."""
    columns = {
        "share of the seconds": ("amount", ".3f"), "prompts": ("split", ""),
        "time of a call": ("time", ".3f"), "interval": ("time_low..time_high", ".3f"),
        "MACs left": ("macs", ".1%"), "parameters": ("parameters", ",.0f"),
        "prompt accuracy (%)": ("accuracy", ".1f"), "difference to the whole": ("difference", ".1f"),
        "95 % interval": ("low..high", ".1f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("removal_time", columns)


def coverage_table() -> str:
    """How often intervals contain the truth."""
    columns = {
        "statistic": ("statistic", ""), "interval": ("interval", ""), "images": ("n", ""),
        "truth": ("truth", ""), "contains the truth (%)": ("coverage_%", ".1f"), "draws": ("draws", ""),
    }  # fmt: skip
    return _benchmark("coverage", columns)


def packed_table() -> str:
    """One UNet step on packed weights."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".2f"), "speed, fp32 = 1": ("speedup", ".2f"),
        "interval": ("speedup_low..speedup_high", ".2f"), "file (GB)": ("file_gb", ".3f"),
        "loaded in (s)": ("load_seconds", ".2f"),
        "memory beyond activations (GiB)": ("weights_gib", ".2f"), "n": ("n", ".0f"),
    }  # fmt: skip
    return _benchmark("packed_sd15", columns)


def little_lost(little: float, tolerance: float) -> list[dict[str, str]]:
    """The models of other tools that lose little on the test prompts, from the smallest on.

    They lose at most `little` of the `tolerance`, as in `sdcomp.study.answers.smallest_file`.
    """
    good = [
        row
        for row in _peers()
        if row["megabytes"]
        and float(row["accuracy_difference"]) >= -little * tolerance
        and float(row["low"]) >= -tolerance
    ]
    return sorted(good, key=lambda row: (float(row["megabytes"]), -float(row["accuracy_difference"])))


def _peers() -> list[dict[str, str]]:
    return [row for row in read("benchmarks/low_bits") if not row["variant"].startswith("sdcomp")]


def smallest_peer(little: float, tolerance: float) -> str:
    """A sentence about the smallest model of another tool that loses little, see `little_lost`."""
    peers, good = _peers(), little_lost(little, tolerance)
    if not good:
        return f"None of {len(peers)} models that other tools make is within the same limits."
    best = good[0]
    change = f"{best['accuracy_difference']} [{best['low']}, {best['high']}]"
    return (
        f"The smallest of {len(peers)} models that other tools make, within the same limits: at least"
        f" {best['megabytes']} MB ({best['variant']}: {change})."
    )


def trials_table() -> str:
    """Other methods for low bits, on top of this package's recipe."""
    columns = {
        "method": ("method", ""), "argument": ("argument", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to fp32": ("accuracy_difference", ".1f"), "95 % interval": ("low..high", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "step error": ("step_error", ".3f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("low_bit_trials", columns)


def interval_ranges_table() -> str:
    """Ranges of timestep intervals at 4 bits beside plain ones."""
    columns = {
        "variant": ("variant", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to `mse`": ("difference", ".1f"), "95 % interval": ("low..high", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "step error": ("step_error", ".3f"), "gain (%)": ("gain", ".1f"),
        "final latent error": ("final_error", ".3f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("interval_ranges", columns)


def low_bits_table() -> str:
    """Images at few bits, here and elsewhere."""
    columns = {
        "variant": ("variant", ""), "prompts": ("split", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to fp32": ("accuracy_difference", ".1f"), "95 % interval": ("low..high", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "file (MB)": ("megabytes", ".2f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("low_bits", columns)


TABLES = {
    "coverage": coverage_table,
    "loading": loading_table,
    "steps": steps_table,
    "quantization, SD 1.5": lambda: quantization_table("sd15"),
    "quantization, tiny": lambda: quantization_table("base"),
    "pruning": pruning_table,
    "removal": removal_table,
    "images after removal": removal_quality_table,
    "removal by time": removal_time_table,
    "int8, SD 1.5": lambda: int8_table("sd15"),
    "int8, where": int8_where_table,
    "int8, tiny": lambda: int8_table("base"),
    "packed weights": packed_table,
    "deploy, SD 1.5": lambda: deploy_table("sd15"),
    "deploy, SD 1.5, int8 scores": lambda: deploy_table("scores_sd15"),
    "deploy, tiny": lambda: deploy_table("tiny"),
    "deploy, images": deploy_images_table,
    "low bits": low_bits_table,
    "trials": trials_table,
    "interval ranges": interval_ranges_table,
}
