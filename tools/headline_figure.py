"""Draw the README's figure: what the images lose against the bytes of a file, beside other tools.

python tools/headline_figure.py

It reads `reports/02_pruning`, `reports/04_combined` and `reports/benchmarks/low_bits.csv`, and writes
`reports/headline.png`.
"""

from __future__ import annotations

from dataclasses import dataclass

import benchmark_tables
import build_readme as readme
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sdcomp.study import FP32, Variant, pruned, style
from sdcomp.study.answers import LITTLE, TOLERANCES

METRIC = "prompt accuracy difference"


@dataclass(frozen=True)
class Point:
    """A file: its name, its megabytes, and the paired difference with its interval, in points."""

    name: str
    megabytes: float
    change: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """The difference with its interval."""
        return f"{self.change:.1f} [{self.low:.1f}, {self.high:.1f}]"


PUBLISHED = (
    ("35 % zeros", pruned("unstructured", 0.35)),
    ("50 % zeros", pruned("unstructured", 0.5)),
    ("5 % of channels\nset to zero", pruned("masked channels", 0.05)),
)
OURS = {
    "int8": readme.INT8,
    "4 bits": readme.packed(4),
    "50 % zeros,\n4 bits": readme.packed(4, readme.ZEROS),
    "60 %\nremoved,\n4 bits": readme.packed(4, readme.SMALLER),
    "60 %\nremoved,\n3 bits": readme.packed(3, readme.SMALLER),
}
BELOW, ABOVE = ("center", "top"), ("center", "bottom")
LEFT, RIGHT = ("right", "center"), ("left", "center")
PLACES = {"4 bits": RIGHT, "torchao W4 g16": BELOW, "50 % zeros": BELOW, "5 % of channels\nset to zero": LEFT}
"""Where the name of a point stands, if not below for this package and above for others."""


def ours(study: str, name: str, variant: Variant, size: str, **about: str) -> Point:
    """A variant of a report; `size` is the metric of its file, `about` says more about the difference."""
    change = readme.find(study, variant.label, METRIC, **about)
    megabytes = readme.find(study, variant.label, size)["value"]
    return Point(name, megabytes, change["value"], change["ci_low"], change["ci_high"])


def peers() -> list[Point]:
    """The smallest model of each other tool that loses little."""
    found = {}
    for row in benchmark_tables.little_lost(LITTLE, TOLERANCES[METRIC]):
        name = row["variant"].partition(",")[0].replace(" dynamic", "")
        numbers = (float(row[key]) for key in ("megabytes", "accuracy_difference", "low", "high"))
        found.setdefault(name.split()[0], Point(name, *numbers))
    return list(found.values())


def draw() -> Figure:
    """Draw all files: grey published pruning, orange other tools, blue this package."""
    half = readme.find("02_pruning", FP32.label, "file, dense")["value"]
    published = [ours("02_pruning", name, variant, "smallest file") for name, variant in PUBLISHED]
    new = [ours("04_combined", name, variant, "UNet file") for name, variant in OURS.items()]
    kinds = {
        "published pruning, weights in fp16": (published, "0.5", "s"),
        "smallest of another tool (lower bound of MB)": (peers(), "C1", "D"),
        "this package": (new, "C0", "o"),
    }
    figure, axis = plt.subplots(figsize=(9, 5))
    axis.axhline(0, color="0.75", linewidth=1, zorder=0)
    axis.plot(half, 0, "s", color="black")
    axis.annotate("fp16", (half, 0), xytext=(0, 7), textcoords="offset points", ha="center")
    for kind, (points, color, marker) in kinds.items():
        sizes = [point.megabytes for point in points]
        bounds = [point.low for point in points], [point.high for point in points]
        axis.vlines(sizes, *bounds, color=color, alpha=0.35, linewidth=3)
        axis.plot(sizes, [point.change for point in points], marker, color=color, markersize=6, label=kind)
        for point in points:
            across, up = PLACES.get(point.name, BELOW if kind == "this package" else ABOVE)
            y = {"top": point.low, "bottom": point.high, "center": point.change}[up]
            shift = {"right": -6, "left": 6, "center": 0}[across], {"top": -3, "bottom": 3, "center": 0}[up]
            look = {"ha": across, "va": up, "fontsize": 8, "color": color}
            axis.annotate(point.name, (point.megabytes, y), xytext=shift, textcoords="offset points", **look)
    axis.set(xscale="log", ylabel="prompt accuracy,\ndifference to the UNet as it is (points)")
    least = min(new, key=lambda point: point.megabytes)
    name, share = least.name.replace("\n", " "), f"{100 * least.megabytes / half:.0f} %"
    again = ours("04_combined", name, OURS[least.name], "UNet file", prompts="final")
    title = (
        f"{name}: {share} of the bytes, {least.words} points; on 256 other prompts {again.words}\n"
        "(tiny model, 256 images a point, 95 % intervals)"
    )
    axis.set_title(title, loc="left", fontsize=10)
    ticks = [2, 3, 4, 6, 8, 12, half]
    axis.set_xticks(ticks, [f"{size:.3g}\n{100 * size / half:.0f} %" for size in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("MB of the UNet's file, and their share of fp16")
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


if __name__ == "__main__":
    style()
    draw().savefig(readme.ROOT / "reports" / "headline.png", dpi=160, bbox_inches="tight")
