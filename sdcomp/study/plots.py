"""The look of figures, and drawings that notebooks share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from sdcomp.study.claims import FAILS, HOLDS, UNKNOWN, not_worse
from sdcomp.study.results import Row


def style() -> None:
    """Set the look of all figures: few lines, a colour-blind safe palette."""
    sns.set_theme(style="ticks", palette="colorblind", context="notebook")
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    )


IMAGES_IN_A_ROW = 8
"""Images that a figure shows of each variant."""


def image_grid(
    rows: Sequence[Tensor],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    *,
    columns: int = IMAGES_IN_A_ROW,
) -> Figure:
    """Draw a grid of images: each of `rows` is a tensor `(N, 3, H, W)` in [0, 1].

    Labels of rows stand at the left, those of columns (prompts) on top. Rows are cut to the shortest, and to
    `columns` images.
    """
    columns = min(columns, *(len(images) for images in rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.25 * columns + 1, 1.25 * len(rows) + 0.6), squeeze=False
    )
    for axis_row, images, label in zip(axes, rows, row_labels, strict=True):
        for axis, image in zip(axis_row, images[:columns], strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axis_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, label in zip(axes[0], column_labels, strict=False):
        axis.set_title(textwrap.fill(label, 22), fontsize=6)
    return figure


def error_band(
    axis: Axes,
    x: Sequence[float],
    rows: Sequence[Row],
    label: str = "",
    color: Any = None,
    linestyle: str = "-",
    marker: str = "o",
) -> None:
    """Draw results (rows of `Run.results`) over `x`: a line, and the intervals as a band or, if few, as bars.

    Without rows (the method failed) nothing is drawn.
    """
    if not rows:
        return
    order = sorted(range(len(x)), key=lambda i: x[i])
    xs, values, lows, highs = zip(
        *((x[i], rows[i]["value"], rows[i]["ci_low"], rows[i]["ci_high"]) for i in order), strict=True
    )
    look = {"marker": marker, "markersize": _size(marker), "linestyle": linestyle, "color": color}
    (line,) = axis.plot(xs, values, label=label, **look)
    if len(xs) > 2:
        axis.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    else:
        axis.vlines(xs, lows, highs, color=line.get_color(), alpha=0.5, linewidth=3)


def _size(marker: str) -> int:
    """The size of a marker; a star looks smaller than its size."""
    return 9 if marker == "*" else 4


def label_ends(axis: Axes) -> None:
    """Write the name of each line beside its right end, in its colour. Names do not overlap.

    Call it when scales and limits are final.
    """
    axis.autoscale_view()  # sets the limits, which matplotlib does only when it draws
    lines = [line for line in axis.lines if len(line.get_xdata()) and not line.get_label().startswith("_")]
    ends = {}
    for line in lines:
        points = axis.transAxes.inverted().transform(axis.transData.transform(line.get_xydata()))
        ends[line] = points[points[:, 0].argmax()]
    height = axis.get_position().height * axis.figure.get_figheight() * 72
    size = 8  # points
    gap, below = 1.25 * size / height, -1.0
    for line, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        below = max(y, below + gap)
        place = {"xytext": (x + 0.02, below), "textcoords": "axes fraction", "va": "center"}
        axis.annotate(
            line.get_label(), (x, y), xycoords="axes fraction", color=line.get_color(), fontsize=size, **place
        )


def scatter(
    axis: Axes,
    cost: Sequence[Row],
    quality: Sequence[Row],
    label: str = "",
    color: Any = None,
    marker: str = "o",
) -> None:
    """Draw quality against cost, row by row (of `Run.results`), with both intervals where they are known."""

    def bars(rows: Sequence[Row]) -> list[list[float]]:
        ends = [
            (row["ci_low"], row["ci_high"]) if row["ci_low"] != "" else 2 * (row["value"],) for row in rows
        ]
        # Rounding can put the end of an interval on the wrong side of a share of 0 or 100 %.
        return [
            [max(0.0, sign * (end[i] - row["value"])) for row, end in zip(rows, ends, strict=True)]
            for i, sign in ((0, -1), (1, 1))
        ]

    x, y = ([row["value"] for row in rows] for rows in (cost, quality))
    look = {"fmt": marker, "markersize": _size(marker), "elinewidth": 1, "label": label, "color": color}
    axis.errorbar(x, y, xerr=bars(cost), yerr=bars(quality), **look)


def heat_map(rows: Sequence[Row], x: str, y: str, label: str) -> Figure:
    """Draw results (rows of `Run.results`) by two of their parameters, in order; colours have a log scale."""
    cells = [{**row["parameters"], "value": row["value"]} for row in rows]
    table = pd.DataFrame(cells).pivot_table("value", y, x, sort=False)
    figure, axis = plt.subplots(figsize=(1.1 * table.shape[1] + 3.2, 0.32 * table.shape[0] + 0.9))
    sns.heatmap(table, ax=axis, cmap="viridis", norm=LogNorm(), cbar_kws={"label": label})
    axis.tick_params(axis="y", rotation=0)
    axis.set(ylabel="")
    return figure


KEPT = {HOLDS: "#9ecae1", UNKNOWN: "0.9", FAILS: "#fdae6b"}
"""Colours of verdicts on a loss."""


def bits_map(axis: Axes, rows: Sequence[Row], tolerance: float) -> None:
    """Draw paired differences (rows of `Run.results`) by bits of weights, down, and of activations, across.

    The values and their intervals stand in the cells. Colours are the verdicts on "loses at most
    `tolerance`", with labels for a legend. Without rows, nothing is drawn.
    """
    if not rows:
        axis.set_axis_off()
        return
    cells = [
        {
            "weights": row["variant"].weight_bits,
            "activations": row["variant"].act_bits,
            "verdict": list(KEPT).index(not_worse(row["ci_low"], row["ci_high"], tolerance)),
            "text": f"{row['value']:.1f}\n[{row['ci_low']:.1f}, {row['ci_high']:.1f}]",
        }
        for row in rows
    ]
    table = pd.DataFrame(cells).pivot(index="weights", columns="activations", values=["verdict", "text"])
    table = table.sort_index(ascending=False).sort_index(axis=1, ascending=False).rename(columns={32: "full"})
    colours = {"cmap": list(KEPT.values()), "vmin": 0, "vmax": len(KEPT) - 1, "cbar": False}
    written = {"annot": table["text"], "fmt": "", "annot_kws": {"fontsize": 10, "color": "black"}}
    sns.heatmap(table["verdict"].astype(float), ax=axis, linewidths=1, **colours, **written)
    for verdict, colour in KEPT.items():
        axis.plot([], [], "s", color=colour, markersize=10, label=verdict)
    axis.set(xlabel="bits of activations", ylabel="bits of weights")
    axis.tick_params(axis="y", rotation=0)


def difference_bars(axis: Axes, rows: Sequence[Row], names: Sequence[str], color: Any) -> None:
    """Draw paired differences (rows of `Run.results`) with their intervals, from top to bottom."""
    axis.axvline(0, color="0.6", linewidth=1)
    interval_bars(axis, rows, range(len(rows), 0, -1), color)
    axis.set_yticks(range(len(rows), 0, -1), names)
    axis.set_ylim(0.5, len(rows) + 0.5)


def interval_bars(
    axis: Axes, rows: Sequence[Row], places: Sequence[float], color: Any, label: str = ""
) -> None:
    """Draw results (rows of `Run.results`) as dots with their intervals across, at heights of the axis."""
    axis.hlines(places, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=color)
    axis.plot([row["value"] for row in rows], places, "o", color=color, label=label)


def error_dots(axis: Axes, x: Sequence[float], rows: Sequence[Row], label: str, color: Any) -> None:
    """Draw results (rows of `Run.results`) over `x` as dots with their intervals, without a line."""
    axis.vlines(x, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=color, alpha=0.5)
    axis.plot(x, [row["value"] for row in rows], "o", markersize=4, color=color, label=label)
