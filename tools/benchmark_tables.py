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
    """A table of a benchmark's file; `columns` maps a heading to what `_cell` shows, and a format.

    Only rows with a value in the column `of` are shown, if that is given. A column without any value is not.
    """
    return _shown([row for row in read(f"benchmarks/{name}") if not of or row[of]], columns)


def _shown(rows: list[dict[str, str]], columns: dict[str, tuple[str, str]]) -> str:
    return _table([{head: _cell(row, *about) for head, about in columns.items()} for row in rows])


def _table(rows: list[dict[str, str]]) -> str:
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, *([row[h] for h in heads] for row in rows)]]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _cell(row: dict, column: str, form: str) -> str:
    """A column, the range "low..high", or a value with its interval, "value[low..high]"."""
    value, _, ends = column.rstrip("]").partition("[")
    if ends:
        interval = ", ".join(number(row[name], form) for name in ends.split(".."))
        return f"{number(row[value], form)} [{interval}]" if row[value] else ""
    values = [row[name] for name in column.split("..")]
    return " to ".join(number(value, form) for value in values) if any(values) else ""


def number(value: str, form: str) -> str:
    """A number in this format, with a space before %; text as it is."""
    return format(float(value), form).replace("%", " %") if value and form else value


def loading_table() -> str:
    """Time and memory of loading Stable Diffusion 1.5, here and in diffusers."""
    columns = {
        "file": ("case", ""), "as": ("dtype", ""), "with": ("loader", ""),
        "loaded in (s)": ("load_s[load_low..load_high]", ".2f"), "and read through (s)": ("read_s", ".2f"),
        "peak anonymous memory (GB)": ("peak_GB", ".2f"), "loads": ("n", ""),
    }  # fmt: skip
    return _benchmark("loading", columns, of="load_s")


def quantization_table() -> str:
    """Cost of simulated quantization."""
    columns = {
        "": ("kind", ""), "method": ("method", ""), "quantizes": ("quantizes", ""),
        "seconds": ("seconds", ".2f"), "relative": ("ratio[ratio_low..ratio_high]", ".2f"),
        "n": ("repeats", ""),
    }  # fmt: skip
    return _benchmark("quantization_sd15", columns)


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
        "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to the whole": ("difference[difference_low..difference_high]", ".1f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("removal_equal", columns)


def int8_table() -> str:
    """One UNet step in integers, here and elsewhere."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".2f"),
        "speed, fp32 = 1": ("speedup[speedup_low..speedup_high]", ".2f"),
        "peak memory (GiB)": ("peak_gib", ".2f"), "n": ("n", ".0f"), "note": ("note", ""),
    }  # fmt: skip
    return _benchmark("int8_sd15", columns)


def deploy_table(model: str) -> str:
    """One UNet step in int8 on several engines."""
    form = ".3f" if model.endswith("tiny") else ".2f"
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", form),
        "speed, fp32 = 1": ("speedup[speedup_low..speedup_high]", ".2f"),
        "peak memory (GiB)": ("peak_gib", ".2f"), "file (GB)": ("file_gb", form), "n": ("n", ".0f"),
        "note": ("note", ""),
    }  # fmt: skip
    return _benchmark(f"deploy_{model}", columns)


def overflow_table() -> str:
    """Engines beside their simulation, by bits of the weights, on a CPU without VNNI."""
    columns = {
        "weights (bits)": ("weight_bits", ""), "engine": ("engine", ""), "weights are": ("execution", ""),
        "to the simulation (dB)": ("to_simulation_db", ".1f"), "to fp32 (dB)": ("to_fp32_db", ".1f"),
        "calls": ("n", ""),
    }  # fmt: skip
    return _benchmark("overflow", columns)


def deploy_images_table() -> str:
    """Images of exported UNets beside those of the simulation that they were made of."""
    columns = {
        "engine": ("engine", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to the simulation": ("accuracy_difference[low..high]", ".1f"),
        "CLIP score, difference": ("clip_difference", ".2f"), "PSNR to the simulation (dB)": ("psnr", ".1f"),
        "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("deploy_images", columns)


def removal_time_table() -> str:
    """Removal by the time that it saves."""
    columns = {
        "share of the seconds": ("amount", ".3f"), "prompts": ("split", ""),
        "time of a call": ("time[time_low..time_high]", ".2f"),
        "MACs left": ("macs", ".1%"), "parameters": ("parameters", ",.0f"),
        "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to the whole": ("difference[low..high]", ".1f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("removal_time", columns)


def coverage_table() -> str:
    """The lowest and the highest coverage of each kind of interval, and where the lowest is."""
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read("benchmarks/coverage"):
        kinds.setdefault((row["statistic"], row["interval"]), []).append(row)
    found = []
    for (statistic, interval), rows in kinds.items():
        low, high = (end(rows, key=lambda row: float(row["coverage_%"])) for end in (min, max))
        worst = {"lowest coverage (%)": low["coverage_%"], "at": f"truth {low['truth']}, {low['n']} images"}
        kind = {"statistic": statistic, "interval": interval}
        found.append(kind | worst | {"highest coverage (%)": high["coverage_%"]})
    return _table(found)


def packed_table() -> str:
    """One UNet step on packed weights."""
    columns = {
        "variant": ("variant", ""), "step (s)": ("seconds", ".2f"),
        "speed, fp32 = 1": ("speedup[speedup_low..speedup_high]", ".2f"), "file (GB)": ("file_gb", ".3f"),
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
    of = f"Of {len(peers)} models that other tools make"
    if not good:
        return f"{of}, none is within the same limits."
    best = good[0]
    change = f"{best['accuracy_difference']} [{best['low']}, {best['high']}]"
    return (
        f"{of}, the smallest within the same limits has at least {best['megabytes']} MB"
        f" ({best['variant']}: {change})."
    )


def trials_table() -> str:
    """Other methods for low bits, on top of this package's recipe."""
    columns = {
        "method": ("method", ""), "argument": ("argument", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to fp32": ("accuracy_difference[low..high]", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "step error": ("step_error", ".3f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("low_bit_trials", columns)


def interval_ranges_table() -> str:
    """Ranges of timestep intervals at 4 bits beside plain ones, which have no difference to themselves."""
    columns = {
        "variant": ("variant", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to `mse`": ("difference", ".1f"), "95 % interval": ("low..high", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "step error": ("step_error", ".3f"), "gain (%)": ("gain", ".1f"),
        "final latent error": ("final_error", ".3f"), "n": ("n", ""),
    }  # fmt: skip
    itself = dict.fromkeys(("difference", "low", "high"), "")
    rows = read("benchmarks/interval_ranges")
    return _shown([row | itself if row["variant"] == "mse" else row for row in rows], columns)


def low_bits_table() -> str:
    """Images at few bits, here and elsewhere."""
    columns = {
        "variant": ("variant", ""), "prompts": ("split", ""), "prompt accuracy (%)": ("accuracy", ".1f"),
        "difference to fp32": ("accuracy_difference[low..high]", ".1f"),
        "PSNR (dB)": ("psnr", ".1f"), "file (MB)": ("megabytes", ".2f"), "n": ("n", ""),
    }  # fmt: skip
    return _benchmark("low_bits", columns)


TABLES = {
    "coverage": coverage_table,
    "loading": loading_table,
    "quantization": quantization_table,
    "pruning": pruning_table,
    "removal": removal_table,
    "images after removal": removal_quality_table,
    "removal by time": removal_time_table,
    "int8, SD 1.5": int8_table,
    "packed weights": packed_table,
    "deploy, SD 1.5": lambda: deploy_table("sd15"),
    "deploy, SD 1.5, int8 scores": lambda: deploy_table("scores_sd15"),
    "deploy, tiny": lambda: deploy_table("tiny"),
    "deploy, SD 1.5, no VNNI": lambda: deploy_table("no_vnni_sd15"),
    "deploy, tiny, no VNNI": lambda: deploy_table("no_vnni_tiny"),
    "overflow": overflow_table,
    "deploy, images": deploy_images_table,
    "low bits": low_bits_table,
    "trials": trials_table,
    "interval ranges": interval_ranges_table,
}
