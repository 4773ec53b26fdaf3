"""How figures look, and the ones that several notebooks draw."""

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


def style() -> None:
    """Set the look of all figures: few lines, a colour-blind safe palette."""
    sns.set_theme(style="ticks", palette="colorblind", context="notebook")
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    )


def image_grid(
    rows: Sequence[Tensor], row_labels: Sequence[str], column_labels: Sequence[str] = ()
) -> Figure:
    """A grid of images: each row a tensor `(N, 3, H, W)` in [0, 1] labelled at its left, prompts on top.

    Rows are cut to the shortest.
    """
    columns = min(len(images) for images in rows)
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
    rows: Sequence[dict[str, Any]],
    label: str = "",
    color: Any = None,
    linestyle: str = "-",
) -> None:
    """Draw results (rows of `Run.results`) over `x`: a line with its interval as a band, or as bars.

    Without results, as of a method that failed, nothing is drawn.
    """
    if not rows:
        return
    order = sorted(range(len(x)), key=lambda i: x[i])
    xs, values, lows, highs = zip(
        *((x[i], rows[i]["value"], rows[i]["ci_low"], rows[i]["ci_high"]) for i in order), strict=True
    )
    look = {"marker": "o", "markersize": 4, "linestyle": linestyle, "color": color}
    (line,) = axis.plot(xs, values, label=label, **look)
    if len(xs) > 2:
        axis.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    else:
        axis.vlines(xs, lows, highs, color=line.get_color(), alpha=0.5, linewidth=3)


def label_ends(axis: Axes, size: float = 8) -> None:
    """Write each line's name beside its right end, in its colour, moved apart where names would overlap.

    For curves that end together; call it when scales and limits are final.
    """
    axis.autoscale_view()  # limits are otherwise not known before the figure is drawn
    lines = [line for line in axis.lines if len(line.get_xdata()) and not line.get_label().startswith("_")]
    ends = {}
    for line in lines:
        points = axis.transAxes.inverted().transform(axis.transData.transform(line.get_xydata()))
        ends[line] = points[points[:, 0].argmax()]
    height = axis.get_position().height * axis.figure.get_figheight() * 72
    gap, below = 1.25 * size / height, -1.0
    for line, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        below = max(y, below + gap)
        place = {"xytext": (x + 0.02, below), "textcoords": "axes fraction", "va": "center"}
        axis.annotate(
            line.get_label(), (x, y), xycoords="axes fraction", color=line.get_color(), fontsize=size, **place
        )


def scatter(
    axis: Axes,
    cost: Sequence[dict[str, Any]],
    quality: Sequence[dict[str, Any]],
    label: str = "",
    color: Any = None,
) -> None:
    """Draw quality against cost, row by row (of `Run.results`), with the intervals of both where known."""

    def bars(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
        ends = [
            (row["ci_low"], row["ci_high"]) if row["ci_low"] != "" else 2 * (row["value"],) for row in rows
        ]
        # Of a share of 0 or 100 % the interval's end may miss it by a rounding.
        return [
            [max(0.0, sign * (end[i] - row["value"])) for row, end in zip(rows, ends, strict=True)]
            for i, sign in ((0, -1), (1, 1))
        ]

    x, y = ([row["value"] for row in rows] for rows in (cost, quality))
    look = {"fmt": "o", "markersize": 4, "elinewidth": 1, "label": label, "color": color}
    axis.errorbar(x, y, xerr=bars(cost), yerr=bars(quality), **look)


def heat_map(rows: Sequence[dict[str, Any]], x: str, y: str, label: str) -> Figure:
    """Results (rows of `Run.results`) on a log scale, by two of their parameters, in the order recorded."""
    cells = [{**row["parameters"], "value": row["value"]} for row in rows]
    table = pd.DataFrame(cells).pivot_table("value", y, x, sort=False)
    figure, axis = plt.subplots(figsize=(1.1 * table.shape[1] + 3.2, 0.32 * table.shape[0] + 0.9))
    sns.heatmap(table, ax=axis, cmap="viridis", norm=LogNorm(), cbar_kws={"label": label})
    axis.tick_params(axis="y", rotation=0)
    axis.set(ylabel="")
    return figure
