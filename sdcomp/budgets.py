"""How much to save at each layer, so that a total is reached at a small summed error."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Curve:
    """What a layer saves (parameters, bytes, time) at each level of compression, and the error that it costs.

    The first level saves nothing, and `saved` increases.
    """

    saved: Sequence[float]
    error: Sequence[float]


def allocate(curves: Mapping[Name, Curve], total: float) -> dict[Name, int]:
    """Choose levels that together save `total` or more, with a small summed error.

    Returns the index of a level for each curve. Takes steps along the lower convex hulls in the order of
    error per saving. After each step the result is optimal for what it saves (Lagrange multipliers; Shoham &
    Gersho 1988). What is left before the last step comes from the one level of any curve that adds the least
    error, so the result may save more than the total, and may miss the best one. Raises ValueError for a
    total beyond what all curves can save.
    """
    levels = dict.fromkeys(curves, 0)
    for name, level, needed in _steps(curves, total):
        saved = curves[name].saved
        if needed < saved[level] - saved[levels[name]]:
            name, level = _cheapest(curves, levels, needed)
        levels[name] = level
    return levels


def _cheapest(curves: Mapping[Name, Curve], levels: Mapping[Name, int], left: float) -> tuple[Name, int]:
    """The curve and its level that save `left` more, at the least additional error."""
    added = {
        (name, level): curve.error[level] - curve.error[levels[name]]
        for name, curve in curves.items()
        for level in range(levels[name] + 1, len(curve.saved))
        if curve.saved[level] - curve.saved[levels[name]] >= left
    }
    return min(added, key=added.get)


def divide(curves: Mapping[Name, Curve], total: float) -> dict[Name, float]:
    """Choose what each curve saves, `total` together, with the smallest summed error.

    As `allocate`, but the last step is taken in part: between two levels a curve counts as a line.
    """
    saved = dict.fromkeys(curves, 0)
    for name, _, step in _steps(curves, total):
        saved[name] += step
    return saved


def _steps(curves: Mapping[Name, Curve], total: float) -> Iterator[tuple[Name, int, float]]:
    """Yield steps until they save `total`: the curve, its new level, and how much of the step is needed."""
    steps = []
    for name, curve in curves.items():
        for before, after in pairwise(lower_hull(curve)):
            saved = curve.saved[after] - curve.saved[before]
            steps.append(((curve.error[after] - curve.error[before]) / saved, len(steps), name, after, saved))
    slack, left = 1e-9 * abs(total), total
    for _, _, name, level, saved in sorted(steps):
        if left <= slack:
            return
        yield name, level, min(saved, left)
        left -= saved
    if left > slack:
        raise ValueError(f"all layers together can save {total - left:g}, less than {total:g}")


def lower_hull(curve: Curve) -> list[int]:
    """The levels on the lower convex hull of the points (saved, error), from the first to the last."""
    corners: list[int] = []
    for level in range(len(curve.saved)):
        while len(corners) > 1 and not _turns_up(curve, corners[-2], corners[-1], level):
            corners.pop()
        corners.append(level)
    return corners


def _turns_up(curve: Curve, a: int, b: int, c: int) -> bool:
    first = (curve.error[b] - curve.error[a]) * (curve.saved[c] - curve.saved[b])
    second = (curve.error[c] - curve.error[b]) * (curve.saved[b] - curve.saved[a])
    return first < second
