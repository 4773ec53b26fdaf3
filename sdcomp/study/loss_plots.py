"""What compression costs in quality, against the bytes and the seconds that it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from sdcomp.study.answers import LITTLE
from sdcomp.study.results import Row
from sdcomp.study.variants import FP32, Variant

Color = str | tuple[float, float, float]
_STAIR = 0.055
"""The height of a line's name, as a share of the axes."""


def kind(variant: Variant) -> str:
    """The pruning of a variant in words: variants of one kind are joined by a line."""
    return "not pruned" if variant.unquantized == FP32 else variant.unquantized.label


def plot_bytes(axis: Axes, points: pd.DataFrame, half: float, tolerance: float) -> None:
    """Draw the `change` of `points` (`sdcomp.study.pareto.measured`) over their `MB`, with intervals.

    One colour is one pruning, and numbers beside dots are bits. `half` is the file of the UNet in fp16. A
    dashed line is the loss that counts as little, a dotted one the `tolerance` of an interval's lower end.
    """
    axis.set(xscale="log", xlim=(0.85 * min([half, *points["MB"]]), 1.25 * max([half, *points["MB"]])))
    for loss, line in ((0, "-"), (LITTLE * tolerance, "--"), (tolerance, ":")):
        axis.axhline(-loss, color="0.75", linewidth=1, linestyle=line, zorder=0)
    axis.plot(half, 0, "s", color="black")
    axis.annotate("fp16", (half, 0), xytext=(0, 7), textcoords="offset points", ha="center")
    lines = points.groupby(points["variant"].map(kind), sort=False)
    ends = {}
    for color, (name, dots) in zip(sns.color_palette(), lines, strict=False):
        dots = dots.sort_values("MB")
        axis.vlines(dots["MB"], dots["worst"], dots["best"], color=color, alpha=0.35, linewidth=3)
        axis.plot(dots["MB"], dots["change"], "o-", color=color, linewidth=1, markersize=5)
        for point in dots.itertuples():
            _write(axis, str(point.variant.weight_bits), point.MB, point.change, color)
        ends[name] = dots["MB"].iloc[0], dots["change"].iloc[0], color
    _name(axis, ends)
    low, high = axis.get_xlim()
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 20, 30) if low <= size <= min(high, 0.8 * half)] + [half]
    axis.set_xticks(sizes, [f"{size:.3g}\n{100 * size / half:.0f} %" for size in sizes])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("MB of the UNet's file, and their share of fp16")


def plot_seconds(axis: Axes, rows: Sequence[Row], seconds: Mapping[Variant, float], steps: int) -> None:
    """Draw results (rows of `Run.results`) over the `seconds` of an image, with intervals, UNet by UNet.

    Points of one line differ in their steps, of which the study has `steps`. The black line is the control,
    fewer steps of fp32; its numbers are the steps.
    """
    lines: dict[Variant, list[Row]] = {}
    for row in rows:
        if row["variant"] in seconds:
            lines.setdefault(replace(row["variant"], steps=0), []).append(row)
    axis.set(xscale="log", xlim=(0.85 * min(seconds.values()), 1.15 * max(seconds.values())))
    ends, colors = {}, iter(sns.color_palette())
    for variant, found in lines.items():
        color = "black" if variant == FP32 else next(colors)
        found.sort(key=lambda row: seconds[row["variant"]])
        x, y = [seconds[row["variant"]] for row in found], [row["value"] for row in found]
        low, high = ([row[end] for row in found] for end in ("ci_low", "ci_high"))
        axis.vlines(x, low, high, color=color, alpha=0.35, linewidth=3)
        axis.plot(x, y, "o-", color=color, linewidth=2 if variant == FP32 else 1, markersize=5)
        if variant == FP32:
            for row, place, value in zip(found, x, y, strict=True):
                _write(axis, str(row["variant"].steps or steps), place, value, color)
        name = "fewer steps alone" if variant == FP32 else f"{kind(variant)}, {variant.execution}"
        ends[name] = x[0], y[0], color
    _name(axis, ends)
    low, high = axis.get_xlim()
    times = {
        n: seconds[FP32] / n for n in (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12) if low <= seconds[FP32] / n <= high
    }
    axis.set_xticks(list(times.values()), [f"{time:.3f}\n{n:g}x" for n, time in times.items()])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("UNet seconds an image, and times as fast as fp32")


def _write(axis: Axes, text: str, x: float, y: float, color: Color) -> None:
    """Write a number beside a dot."""
    place = {"xytext": (4, -10), "textcoords": "offset points", "fontsize": 8}
    axis.annotate(text, (x, y), color=color, **place)


def _name(axis: Axes, ends: Mapping[str, tuple[float, float, Color]]) -> None:
    """Write the name of each line above its left end `(x, y)`; names go down like stairs to the right.

    They stand inside the axes, above all points, where a title keeps clear of them.
    """
    low, high = axis.get_ylim()
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= high])
    axis.set_ylim(low, low + (high - low) / (1 - _STAIR * len(ends)))
    for step, (name, (x, y, color)) in enumerate(sorted(ends.items(), key=lambda item: item[1][0])):
        axis.annotate(
            name,
            (x, y),
            xytext=(x, 1 - _STAIR * (step + 0.5)),
            textcoords=axis.get_xaxis_transform(),
            color=color,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
