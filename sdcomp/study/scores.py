"""The scores of every image of a run, `images.csv`, and the intervals that follow from them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sdcomp.evaluation import Estimate, estimate, paired_difference, share_estimate
from sdcomp.evaluation.metrics import decibels
from sdcomp.study.results import Row, name_of
from sdcomp.study.variants import Variant

KEYS = ["subject", "prompts", "image", "scene"]
SQUARED = "squared error"
"""The column that PSNR follows from."""


def column(metric: str, about: dict[str, Any]) -> str:
    """The column of a metric, such as "noise MSE at timestep 951"."""
    return " ".join([metric, *(str(about[name]) for name in sorted(about))])


class ImageScores:
    """Scores image by image. One row is one image of one subject; each metric has a column.

    `scene` numbers the scenes: images of one scene are not independent. An image without a score, or for
    which a score does not apply, has an empty cell.
    """

    def __init__(self) -> None:
        self._cells: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._scenes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def keep(
        self,
        subject: Variant | str,
        metric: str,
        values: Tensor,
        groups: Sequence[Hashable],
        *,
        prompts: str = "judged",
        places: Sequence[int] | None = None,
        **about: Any,
    ) -> None:
        """Keep the scores `(n,)` of the first n images; `groups` names the scene of each.

        `prompts` names the set of prompts that the images show. NaN marks a score that does not apply. For
        other images than the first, `places` has their numbers.
        """
        numbers = range(len(values)) if places is None else places
        for image, value, group in zip(numbers, values.tolist(), groups, strict=True):
            scene = self._scenes.setdefault(group, len(self._scenes))
            cells = self._cells.setdefault((name_of(subject), prompts, image), {"scene": scene})
            cells[column(metric, about)] = value

    def write(self, path: Path) -> None:
        """Write the table; 9 digits are enough for the bits of a float32."""
        rows = [
            dict(zip(KEYS, key, strict=False)) | {name: _text(value) for name, value in cells.items()}
            for key, cells in self._cells.items()
        ]
        pd.DataFrame(rows).to_csv(path, index=False)


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


class ReadScores:
    """The scores of a written `images.csv`."""

    def __init__(self, path: Path) -> None:
        self.table = pd.read_csv(path, low_memory=False, keep_default_na=False, na_values=["", "nan"])

    def of(self, subject: str, name: str) -> tuple[Tensor, list[int]] | None:
        """A subject's scores in the column of that name and their scenes; None where there are none."""
        if name not in self.table:
            return None
        rows = self.table[(self.table.subject == subject) & self.table[name].notna()]
        values = rows[name].to_numpy()
        if not len(values):
            return None
        # A column of True and False is one of text where some cells are empty.
        right = np.isin(values.astype(str), ["True", "False"]).all()
        found = torch.tensor(values.astype(str) == "True" if right else values.astype(float))
        return found, rows.scene.tolist()


def recomputed(row: Row, scores: ReadScores) -> Estimate | None:
    """The estimate of a row of results, from the scores of images; None where it has another source."""
    metric, about = row["metric"], row["about"]
    if metric == "PSNR":
        found = scores.of(row["label"], column(SQUARED, about))
        return found and decibels(*found)
    name = column(metric.removesuffix(" difference"), about)
    if metric.endswith(" difference"):
        pair = [scores.of(who, name) for who in (row["label"], row["baseline"])]
        return paired_difference(pair[0][0], pair[1][0], pair[0][1]) if all(pair) else None
    found = scores.of(row["label"], name)
    if found is None:
        return None
    # Stored as numbers, since of two objects one can be right.
    return share_estimate(*found) if metric == "missed" or metric.endswith(" right") else estimate(*found)
