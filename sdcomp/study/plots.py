"""How figures look, and the ones that several notebooks draw."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
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
) -> None:
    """Draw results (rows of `Run.results`) over `x`: a line with its interval as a band, or as bars."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    xs, values, lows, highs = zip(
        *((x[i], rows[i]["value"], rows[i]["ci_low"], rows[i]["ci_high"]) for i in order), strict=True
    )
    (line,) = axis.plot(xs, values, "o-", markersize=4, label=label, color=color)
    if len(xs) > 2:
        axis.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    else:
        axis.vlines(xs, lows, highs, color=line.get_color(), alpha=0.5, linewidth=3)
