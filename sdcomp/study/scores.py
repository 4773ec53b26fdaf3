"""The scores of every image of a run, `images.csv`, and the intervals that follow from them."""

from __future__ import annotations

import re
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
from sdcomp.study.variants import FP32, Variant

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
        by_image = self.table.set_index(["prompts", "image"]).sort_index()
        self._subjects = dict(iter(by_image.groupby("subject")))

    def of(self, subject: str, name: str, prompts: str = "") -> tuple[Tensor, list[int]] | None:
        """A subject's scores in the column of that name and their scenes, see `paired`."""
        found = self.paired((subject, name), prompts=prompts)
        return found and (found[0][0], found[1])

    def paired(self, *wanted: tuple[str, str], prompts: str = "") -> tuple[list[Tensor], list[int]] | None:
        """The scores of the same images, for each subject and its column, and the scenes of these images.

        `prompts` names the prompt set; empty: the only one, or "judged" where a subject has several. None
        where there are no such images.
        """
        columns = [self._column(subject, name, prompts) for subject, name in wanted]
        if any(values is None for values in columns):
            return None
        table = pd.concat(columns, axis=1, join="inner")
        scenes = self._subjects[wanted[0][0]].scene[table.index].tolist()
        return ([_read(values) for _, values in table.items()], scenes) if scenes else None

    def _column(self, subject: str, name: str, prompts: str) -> pd.Series | None:
        """A subject's scores by prompt set and image."""
        if name not in self.table or subject not in self._subjects:
            return None
        values = self._subjects[subject][name].dropna()
        sets = values.index.get_level_values("prompts")
        return values[sets == (prompts or "judged")] if prompts or sets.nunique() > 1 else values


def _read(column: pd.Series) -> Tensor:
    """A column as bool or float. One of True and False is one of text where some of its cells are empty."""
    text = column.to_numpy().astype(str)
    return torch.tensor(text == "True" if np.isin(text, ["True", "False"]).all() else text.astype(float))


def recomputed(row: Row, scores: ReadScores) -> Estimate | None:
    """The estimate of a row of results, from the scores of images; None where it has another source."""
    metric, about = row["metric"], dict(row["about"])
    prompts = about.pop("prompts", "")
    if metric == "PSNR":
        found = scores.of(row["label"], column(SQUARED, about), prompts)
        return found and decibels(*found)
    if metric.endswith(" difference"):
        found = scores.paired(*_compared(row, about), prompts=prompts)
        return found and _difference(*found)
    found = scores.of(row["label"], column(metric, about), prompts)
    if found is None:
        return None
    # Stored as numbers, since of two objects one can be right.
    return share_estimate(*found) if metric.endswith(" right") else estimate(*found)


def _compared(row: Row, about: dict[str, Any]) -> list[tuple[str, str]]:
    """The subjects and columns behind a difference: two scores, or the two of each of two differences."""
    kind, score = re.fullmatch(r"((?:change|interaction) of the )?(.*) difference", row["metric"]).groups()
    who, baseline, name = row["label"], row["baseline"], column(score, about)
    if not kind:
        return [(who, name), (baseline, name)]
    if kind.startswith("change"):  # to the study's own condition
        return [(who, name), (FP32.label, name), (who, score), (FP32.label, score)]
    return [(who, name), (row["variant"].unquantized.label, name), (baseline, name), (FP32.label, name)]


def _difference(values: list[Tensor], scenes: list[int]) -> Estimate:
    """The paired difference of two scores, or of two differences of scores."""
    if len(values) == 2:
        return paired_difference(*values, scenes)
    kind = torch.int8 if values[0].dtype == torch.bool else torch.double
    a, b, c, d = (column.to(kind) for column in values)
    return paired_difference(a - b, c - d, scenes)
