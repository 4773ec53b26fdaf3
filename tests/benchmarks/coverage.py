"""How often the 95 % intervals of this package contain the truth.

    python tests/benchmarks/coverage.py --out reports/benchmarks/coverage.csv

Shares of independent images and medians are exact sums over all outcomes, everything else takes random draws.
In clusters every second scene has two images, which agree more often than chance; a scene of the test prompts
has 1.4. Beside the score intervals stands the bootstrap of images, which they replace.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from math import lgamma
from typing import Any

import numpy as np
import pandas as pd
import torch

from sdcomp.evaluation import Estimate, bootstrap, kid_values, median
from sdcomp.evaluation.share_intervals import difference_of_changes, effective_number, tango, wilson

NUMBERS = (16, 64, 256)
SHARES = (0.02, 0.5, 0.9)
CHANGES = ((0.01, 0.01), (0.02, 0.05), (0.1, 0.2))
"""Shares of the pairs that are gained and lost."""
SLACK = 1e-9
"""An interval may end at the truth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--draws", type=int, default=1000, help="of each bootstrap; shares take 10 times more"
    )
    parser.add_argument("--out", help="CSV file for the table")
    options = parser.parse_args()
    table = pd.DataFrame([row for part in PARTS for row in part(options.draws)])
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False)


def row(statistic: str, interval: str, n: int, truth: Any, held: float, draws: int | str) -> dict[str, Any]:
    """A row of the table; `held` is the share of the intervals that contain the truth."""
    return {
        "statistic": statistic,
        "interval": interval,
        "n": n,
        "truth": truth,
        "coverage_%": round(100 * held, 1),
        "draws": draws,
    }


def holds(ends: tuple[np.ndarray, np.ndarray], truth: float) -> np.ndarray:
    return (ends[0] <= truth + SLACK) & (truth - SLACK <= ends[1])


def chances(counts: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The multinomial probability of counts `(..., k)` at `rates` `(k,)`."""
    ways = np.vectorize(lambda k: lgamma(k + 1))
    n = counts.sum(-1)
    return np.exp(ways(n) - ways(counts).sum(-1) + (counts * np.log(rates)).sum(-1))


def independent_shares(draws: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for n in NUMBERS:
        right = np.arange(n + 1)
        drawn = rng.binomial(n, right / n, (2000, n + 1)) / n
        ends = {"Wilson": wilson(right / n, n), "bootstrap": np.percentile(drawn, [2.5, 97.5], axis=0)}
        for share in SHARES:
            chance = chances(np.stack([right, n - right], -1), np.array([share, 1 - share]))
            for name, found in ends.items():
                yield row("share", name, n, share, chance[holds(found, share)].sum(), "all")


def paired_shares(draws: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(1)
    for n in NUMBERS:
        gained, lost = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
        counts = np.stack([gained, lost, n - gained - lost], -1)[gained + lost <= n]
        ends = tango(counts[:, 0] / n, counts[:, 1] / n, n)
        for rates in CHANGES:
            truth, all_rates = rates[0] - rates[1], np.array([*rates, 1 - sum(rates)])
            chance = chances(counts, all_rates)
            about = "paired difference of shares"
            yield row(about, "Tango", n, rates, chance[holds(ends, truth)].sum(), "all")
            held = []
            for drawn in rng.multinomial(n, all_rates, draws):
                again = rng.multinomial(n, drawn / n, 2000)
                held.append(holds(np.percentile((again[:, 0] - again[:, 1]) / n, [2.5, 97.5]), truth))
            yield row(about, "bootstrap", n, rates, np.mean(held), draws)


def interactions(draws: int) -> Iterator[dict[str, Any]]:
    """Differences of two independent paired differences; the second has half of the rates."""
    rng = np.random.default_rng(5)
    for n in NUMBERS:
        for rates in CHANGES:
            truth, found = (rates[0] - rates[1]) / 2, []
            for part in (np.array(rates), np.array(rates) / 2):
                found.append(rng.choice([1, -1, 0], (10 * draws, n), p=[*part, 1 - part.sum()]))
            values = found[0] - found[1]
            ends = difference_of_changes(values.mean(1), np.square(values).mean(1), n)
            about = "paired difference of shares, less another"
            yield row(about, "Agresti-Min", n, rates, holds(ends, truth).mean(), 10 * draws)
            held = []
            for drawn in values[:draws]:
                again = rng.choice(drawn, (2000, n)).mean(1)
                held.append(holds(np.percentile(again, [2.5, 97.5]), truth))
            yield row(about, "bootstrap", n, rates, np.mean(held), draws)


def scenes(n: int) -> np.ndarray:
    """The scene of each of `n` images: two of three images share theirs."""
    return np.repeat(np.arange(n), np.arange(n) % 2 + 1)[:n]


def clusters(
    rng: np.random.Generator, rates: tuple[float, ...], draws: int, members: np.ndarray
) -> np.ndarray:
    """Outcomes `(draws, n)`, one for each rate; with a chance of 1/2 an image repeats that of its scene."""
    size = (draws, len(members))
    single, common = (np.searchsorted(np.cumsum(rates), rng.random(size), side="right") for _ in range(2))
    return np.where(rng.random(size) < 0.5, common[:, members], single)


def clustered_shares(draws: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(2)
    for n in NUMBERS:
        members = scenes(n)
        for share in SHARES:
            right = clusters(rng, (1 - share,), 10 * draws, members).astype(float)
            ends = wilson(right.mean(1), effective_number(right, members))
            yield row("share, clustered", "Wilson", n, share, holds(ends, share).mean(), 10 * draws)
        for rates in CHANGES:
            change = clusters(rng, rates, 10 * draws, members)
            gained, lost = (change == 0).astype(float), (change == 1).astype(float)
            number = effective_number(gained - lost, members)
            held = holds(tango(gained.mean(1), lost.mean(1), number), rates[0] - rates[1]).mean()
            yield row("paired difference of shares, clustered", "Tango", n, rates, held, 10 * draws)


def simulated(draws: int, draw: Callable[[], Estimate], truth: float) -> float:
    found = (draw() for _ in range(draws))
    return float(np.mean([x.low <= truth <= x.high for x in found]))


def means(draws: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(3)
    for n in NUMBERS:
        members = scenes(n)

        def normal(n: int = n, members: np.ndarray = members) -> Estimate:
            values = rng.standard_normal(n) + rng.standard_normal(n)[members]
            return bootstrap(torch.from_numpy(values), groups=members.tolist())

        def skewed(n: int = n) -> Estimate:
            return bootstrap(torch.from_numpy(rng.exponential(size=n)))

        yield row("mean of normal scores, clustered", "bootstrap", n, 0, simulated(draws, normal, 0), draws)
        yield row("mean of exponential scores", "bootstrap", n, 1, simulated(draws, skewed, 1), draws)


def medians(draws: int) -> Iterator[dict[str, Any]]:
    for n in NUMBERS:
        # The interval ends at two ranks. It misses where too few of n values lie on one side of the truth.
        rank = int(median(np.arange(n)).low)
        below = np.arange(rank + 1)
        missed = 2 * chances(np.stack([below, n - below], -1), np.array([0.5, 0.5])).sum()
        yield row("median", "order statistics", n, "any", 1 - missed, "all")


def distances(draws: int) -> Iterator[dict[str, Any]]:
    """KID between images of one kind: of the same scenes, and of as many others."""
    rng = np.random.default_rng(4)
    for n in NUMBERS[1:]:
        members = scenes(n)
        theirs = [*members.tolist(), *(members + n).tolist()]

        def kid(n: int = n, members: np.ndarray = members, theirs: list[int] = theirs) -> Estimate:
            scene = 1 + 0.7 * rng.standard_normal((2 * n, 16))
            x, y = (
                torch.from_numpy(scene[g] + 0.7 * rng.standard_normal((len(g), 16)))
                for g in (members, theirs)
            )
            return bootstrap(kid_values(x, y, members.tolist(), theirs), groups=members.tolist())

        yield row("KID of equal sets", "bootstrap", n, 0, simulated(draws // 5, kid, 0), draws // 5)


PARTS = (independent_shares, paired_shares, interactions, clustered_shares, means, medians, distances)

if __name__ == "__main__":
    main()
