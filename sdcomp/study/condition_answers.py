"""What 07_conditions may say in words, from paired differences to fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdcomp.evaluation.confidence_intervals import student
from sdcomp.study.answers import ENOUGH
from sdcomp.study.results import Row, with_interval


def sure(row: Row) -> bool:
    """Whether an interval leaves 0 out."""
    return row["ci_low"] > 0 or row["ci_high"] < 0


def reach(row: Row) -> float:
    """Half the width of an interval."""
    return (row["ci_high"] - row["ci_low"]) / 2


def draws_spread(draws: Sequence[Sequence[Row]]) -> float:
    """The standard deviation between draws, pooled over groups of them; NaN without a group of two.

    Each item has the rows of one number of prompts, a row for each draw. From a few draws it is a rough
    estimate. It also holds what finitely many images add, since a draw changes all of them.
    """
    values = [[row["value"] for row in group] for group in draws if group]
    free = _free(draws)
    return float(np.sqrt(sum(len(g) * np.var(g) for g in values) / free)) if free else float("nan")


def _free(draws: Sequence[Sequence[Row]]) -> int:
    """The degrees of freedom of `draws_spread`."""
    return sum(len(group) - 1 for group in draws if group)


def calibration_answer(draws: Mapping[str, Sequence[Row]]) -> str:
    """Sentences about draws of calibration prompts, against what the images leave open.

    `draws` has the rows of the draws by the name of their group, such as "16 prompts".
    """
    rows = [row for group in draws.values() for row in group]
    if not rows:
        return "No calibration gave images."
    lines = [_draws(name, group) for name, group in draws.items()]
    return "\n".join([*lines, draws_against_images(draws)])


def draws_against_images(draws: Mapping[str, Sequence[Row]]) -> str:
    """Sentences about the standard deviation between draws, and how much wider it makes intervals.

    The draws' part is as wide as Student's t, since their standard deviation comes from few draws. With fewer
    than 3 degrees of freedom there is no such sentence.
    """
    groups = list(draws.values())
    rows = [row for group in groups for row in group]
    if rows and (few := _few(rows[0])):
        return f"{few} How much draws differ stays open."
    if _free(groups) < 3:
        return "It takes more draws to tell how much draws differ."
    spread, points = draws_spread(groups), _points(rows[0])
    alone = float(np.median([reach(row) for row in rows]))
    both = float(np.hypot(alone, student(_free(groups)) * spread))
    return (
        f"Draws of equally many prompts have a standard deviation of {spread:.1f} {points}. With them,"
        f" intervals reach {both:.1f} {points} to each side instead of {alone:.1f}."
    )


def _draws(name: str, rows: Sequence[Row]) -> str:
    low, high = (f"{end(row['value'] for row in rows):.1f}" for end in (min, max))
    values = f"{len(rows)} draws: {low} to {high}" if len(rows) > 1 else f"1 draw: {low}"
    alone = np.median([reach(row) for row in rows])
    return f"{name}, {values} {_points(rows[0])}; an interval by images reaches {alone:.1f} to each side."


def changes_answer(changes: Sequence[Row], own: str) -> str:
    """A sentence about conditions under which a loss is another than under the study's `own`.

    `changes` are rows of the difference between two paired differences, a row for each variant and condition;
    their entry `condition` names the condition.
    """
    if not changes:
        return "No other condition was run."
    few = _few(changes[0])
    other = [row for row in changes if sure(row)]
    if few:
        return f"{few} Whether a loss is another than under {own} stays open."
    widest = max(reach(row) for row in changes)
    if not other:
        return (
            f"No loss is shown to be another than under {own}. The intervals of {len(changes)} changes reach"
            f" up to {widest:.1f} {_points(changes[0])} to each side."
        )
    found = "; ".join(f"{row['condition']}, {row['label']}: {with_interval(row)}" for row in other)
    return (
        f"{len(changes)} losses were compared with those under {own}. For {len(other)} the interval of the"
        f" change leaves out 0; chance alone gives about {len(changes) / 20:.1f}. {found}."
    )


def lost_first(rows: Sequence[Row]) -> list[Row]:
    """The attributes that the gentlest variant with a clear loss loses. The worst stands first.

    A loss is clear if it is shown here and in all harsher variants, each by its own interval: with many
    attributes, one variant alone may show a loss by chance.

    `rows` are paired differences of the accuracy of attributes, variant by variant from gentle to harsh. Half
    of `ENOUGH` images are enough, because half of the scenes have one object, and no relation.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    found = {(row["label"], row["about"]["attribute"]) for row in rows if _loses(row)}
    for i, label in enumerate(labels):
        lost = [
            row
            for row in rows
            if row["label"] == label and all((b, row["about"]["attribute"]) in found for b in labels[i:])
        ]
        if lost:
            return sorted(lost, key=lambda row: row["value"])
    return []


def _loses(row: Row) -> bool:
    return row["ci_high"] < 0 and row["n"] >= ENOUGH // 2


def first_failure(rows: Sequence[Row]) -> str:
    """A sentence about `lost_first`."""
    if not rows:
        return "No reader judges these images, so no attribute can be told."
    if (n := max(row["n"] for row in rows)) < ENOUGH:
        return f"{n:g} images are too few to tell which attribute is lost first."
    lost = lost_first(rows)
    if not lost:
        gentle, harsh = rows[0]["label"], rows[-1]["label"]
        return f"From {gentle} to {harsh}, no attribute is lost for certain at this n."
    said = ", ".join(f"{row['about']['attribute']} {with_interval(row)}" for row in lost)
    return f"{lost[0]['label']} is the first with clear losses ({_points(lost[0])}): {said}."


def failure_title(rows: Sequence[Row]) -> str:
    """`first_failure` in few words, for a title."""
    n = max((row["n"] for row in rows), default=0)
    if n < ENOUGH:
        return f"{n:g} images are too few to tell"
    lost, labels = lost_first(rows), list(dict.fromkeys(row["label"] for row in rows))
    if not lost:
        return "no clear loss"
    *names, last = (row["about"]["attribute"] for row in lost)
    said = f"{', '.join(names)} and {last}" if names else last
    before = labels.index(lost[0]["label"]) - 1
    gentler = f"; {labels[before]} shows no clear loss" if before >= 0 else ""
    return f"{lost[0]['label']} loses {said}{gentler}"


def _few(row: Row) -> str:
    return f"{row['n']:g} images are fewer than {ENOUGH}." if row["n"] < ENOUGH else ""


def _points(row: Row) -> str:
    return "points" if row["unit"] == "%" else row["unit"]
