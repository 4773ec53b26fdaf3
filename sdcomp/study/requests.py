"""Pruned variants that a notebook's parameter asks for, in words such as "removed 0.25 recovered 400"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdcomp.pruning import IMPORTANCES
from sdcomp.study.variants import Variant, patterned, pruned

KINDS = {"unstructured": "unstructured", "masked": "masked channels", "removed": "removed"}
"""First words, and the pruning that they ask for. A pattern such as 2:4 is one too."""
_NORMS = ("l1", "l2")
_TAKES = {
    "unstructured": IMPORTANCES,
    "pattern": IMPORTANCES,
    "masked channels": _NORMS,
    "removed": (*_NORMS, *IMPORTANCES),
}
"""What may find the least important."""
_DEFAULTS = ("magnitude", "l2")


def requested(text: str) -> Variant:
    """The variant that a text asks for: what is pruned, how much of it, and how.

    What: `unstructured`, `masked` (output channels) or `removed` with a share from 0 to below 1, or a pattern
    such as `2:4`. How: an importance (see `sdcomp.pruning.IMPORTANCES`) or the norm `l1` or `l2` of channels;
    `global`; `recovered` with a number of training steps. Two examples: "unstructured 0.6 global
    second_order" and "removed 0.25 second_order recovered 400". A share of 0 is the baseline.

    Raises ValueError for other words, and for what cannot go together.
    """
    what, *words = text.split() or [""]
    if what not in KINDS and ":" not in what:
        raise ValueError(f"a variant begins with {', '.join(KINDS)} or a pattern such as 2:4, not {what!r}")
    amount = 0.0 if ":" in what else _share(words)
    how = _options(words)
    pruning = "pattern" if ":" in what else KINDS[what]
    _check(pruning, **how)
    if how.get("importance") in _DEFAULTS:
        how["importance"] = ""
    return patterned(what, **how) if ":" in what else pruned(pruning, amount, **how)


def _share(words: list[str]) -> float:
    """Take the share off the front of the words."""
    share = float(words.pop(0)) if words else -1.0
    if not 0 <= share < 1:
        raise ValueError("a share is from 0 to below 1")
    return share


def _options(words: Sequence[str]) -> dict[str, Any]:
    """The fields of a variant that the words after the share stand for."""
    found: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        name = {"global": "scope", "recovered": "recover_steps"}.get(word, "importance")
        if name in found:
            raise ValueError(f"{word!r} says {name} once more")
        if name == "recover_steps":
            found[name] = int(left.pop(0)) if left else 0
        else:
            found[name] = word
    return found


def _check(pruning: str, *, scope: str = "layer", importance: str = "", recover_steps: int = 1) -> None:
    """Raise ValueError for what the library cannot do."""
    if importance and importance not in _TAKES[pruning]:
        raise ValueError(f"{pruning} goes by {', '.join(_TAKES[pruning])}, not {importance!r}")
    if scope == "global" and pruning == "masked channels":
        raise ValueError("channels are masked layer by layer: leave global out")
    if scope == "global" and pruning == "removed" and importance != "second_order":
        raise ValueError("global removal goes by second_order")
    if recover_steps < 1:
        raise ValueError("recovered needs a number of steps from 1")
