"""Draw how often the 95 % intervals contain the truth: reports/benchmarks/coverage.png.

python tools/coverage_figure.py

It reads `reports/benchmarks/coverage.csv`, which `tests/benchmarks/coverage.py` writes.
"""

from __future__ import annotations

import benchmark_tables
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sdcomp.study import style

PANELS = {
    "share": "shares",
    "paired difference of shares": "paired differences of shares",
    "mean": "means and KID (bootstrap), medians",
}
"""Kinds of statistics, by how their names begin; the first that fits counts."""
NAMES = {
    "Wilson": ("Wilson", 7, "bottom"),
    "Tango": ("Tango, Agresti-Min", 6, "bottom"),
    "mean of exponential scores": ("exponential scores", 5, "bottom"),
    "mean of normal scores, clustered": ("normal scores", -4, "top"),
    "median": ("medians", -5, "top"),
    "KID of equal sets": ("KID of equal sets", 5, "bottom"),
}
"""Names of lines by interval or statistic, and where they stand: points above the first mark."""
ALLOWED = (3, 7)
Row = dict[str, str]


def panel(row: Row) -> str:
    """The panel of a row: the statistics that are neither shares nor differences stand in the last one."""
    kinds = list(PANELS)
    return next((kind for kind in kinds if row["statistic"].startswith(kind)), kinds[-1])


def used(row: Row) -> bool:
    """Whether the studies take this interval; the bootstrap of shares is only for comparison."""
    return row["interval"] != "bootstrap" or panel(row) == "mean"


def missed(row: Row) -> float:
    """The share of the intervals without the truth, in percent."""
    return 100 - float(row["coverage_%"])


def title(rows: list[Row]) -> str:
    """The point of the figure, from the rows."""
    most = {kind: max(missed(row) for row in rows if used(row) == kind) for kind in (True, False)}
    return (
        f"The intervals that the studies use miss the truth in at most {most[True]:.0f} % of cases,"
        f" the bootstrap of shares in up to {most[False]:.0f} %"
    )


def draw(rows: list[Row]) -> Figure:
    """Draw one panel for each kind of statistic; the lines are its truths, over the number of images."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.6), sharey=True)
    for axis, (kind, words) in zip(axes, PANELS.items(), strict=True):
        axis.axhspan(*ALLOWED, color="0.88", linewidth=0, zorder=0)
        lines: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if panel(row) == kind:
                lines.setdefault((row["statistic"], row["interval"], row["truth"]), []).append(row)
        names = dict(NAMES)
        for line in sorted(lines.values(), key=lambda line: -missed(line[0])):
            color, marker = ("C0", "o") if used(line[0]) else ("C1", "s")
            xs, ys = [float(row["n"]) for row in line], [missed(row) for row in line]
            axis.plot(xs, ys, color=color, marker=marker, markersize=4, linewidth=1, alpha=0.8)
            key = line[0]["interval"] if line[0]["interval"] in names else line[0]["statistic"]
            name, up, place = names.pop(key, ("", 0, "top"))
            look = {"textcoords": "offset points", "va": place, "fontsize": 8, "color": color}
            axis.annotate(name, (xs[0], ys[0]), xytext=(0, up), **look)
        worst = max((row for row in rows if panel(row) == kind), key=missed)
        if not used(worst):
            look = {"textcoords": "offset points", "fontsize": 8, "color": "C1"}
            axis.annotate("bootstrap", (float(worst["n"]), missed(worst)), xytext=(7, 2), **look)
        axis.set_title(words, fontsize=10)
        axis.set(xscale="log", xlabel="images")
        axis.set_xticks([16, 64, 256], ["16", "64", "256"])
        axis.set_xticks([], minor=True)
    axes[0].set_yscale("function", functions=(np.sqrt, np.square))
    axes[0].set(ylim=(0, 80), yticks=[0, 1, 3, 5, 7, 20, 40, 70])
    axes[0].set_ylabel("intervals that miss the truth (%),\nsquare root scale", fontsize=10)
    axes[0].text(256, ALLOWED[1], "3 to 7 %", ha="right", va="bottom", fontsize=8, color="0.4")
    figure.suptitle(title(rows), x=0.01, ha="left", fontsize=10)
    return figure


if __name__ == "__main__":
    style()
    figure = draw(benchmark_tables.read("benchmarks/coverage"))
    figure.savefig(benchmark_tables.REPORTS / "benchmarks" / "coverage.png", dpi=120, bbox_inches="tight")
