"""Compute every interval of a report again from the scores of its images, and compare.

python tools/recompute_intervals.py [FOLDER ...]

A folder has `metrics.csv` and `images.csv`; by default all of `reports/*`. The exit status is 1 where an
interval differs. Intervals that have another source, such as times, are counted by metric.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sdcomp.study.results import read_rows
from sdcomp.study.scores import ReadScores, recomputed

ROOT = Path(__file__).resolve().parents[1]


def main(folders: Sequence[str]) -> int:
    """Compare the intervals of these folders; returns the exit status."""
    paths = [Path(folder) for folder in folders]
    paths = paths or sorted(path.parent for path in ROOT.glob("reports/*/images.csv"))
    return int(sum(_differences(path) for path in paths) > 0)


def _differences(folder: Path) -> int:
    """Print what differs in a folder, and return in how many rows."""
    scores, same, differs, elsewhere = ReadScores(folder / "images.csv"), 0, 0, Counter()
    for row in read_rows(folder / "metrics.csv"):
        if math.isnan(row["n"]):
            continue
        found = recomputed(row, scores)
        if found is None:
            elsewhere[row["metric"]] += 1
            continue
        recorded, again = (row["value"], row["ci_low"], row["ci_high"]), (found.value, found.low, found.high)
        # The report has six digits.
        width = abs(found.high - found.low)
        if row["n"] == found.n and all(
            math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-4 * width) or (math.isnan(a) and math.isnan(b))
            for a, b in zip(recorded, again, strict=True)
        ):
            same += 1
            continue
        differs += 1
        print(f"{row['label']}, {row['metric']} {row['about'] or ''} differs: {recorded}, again {again}")
    print(f"{folder}: {same} intervals are the same, {differs} differ")
    if elsewhere:
        print("  not from these images:", ", ".join(f"{name} ({n})" for name, n in elsewhere.items()))
    return differs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
