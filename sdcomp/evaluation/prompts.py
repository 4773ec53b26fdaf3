"""The prompts that studies generate from, and where there are any, the scenes that they describe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdcomp.errors import UserError
from sdcomp.files import find
from sdcomp.model import StableDiffusion
from sdcomp.scenes import Scene

FOLDER = Path("data/prompts")


@dataclass(frozen=True)
class Prompts:
    """Texts, and for the base model the scene of each, else None."""

    texts: list[str]
    scenes: list[Scene] | None = None

    @property
    def groups(self) -> list[str]:
        """What each prompt is about: its scene, else its text. Images of one group are not independent."""
        return self.texts if self.scenes is None else [repr(scene) for scene in self.scenes]

    def subset(self, rows: Sequence[int]) -> Prompts:
        """Some of the prompts, in the order given."""
        scenes = None if self.scenes is None else [self.scenes[i] for i in rows]
        return Prompts([self.texts[i] for i in rows], scenes)

    def __len__(self) -> int:
        return len(self.texts)


def load_prompts(sd: StableDiffusion, name: str, n: int) -> Prompts:
    """The first `n` prompts of a set: "test", "unseen" (the base model only) or "calibration".

    The sets are disjoint files in `data/prompts`. Raises UserError where there are not `n`.
    """
    kind = "scenes" if sd.reader is not None else "sd15"
    path = find(FOLDER / f"{kind}_{name}.jsonl")
    if not path.exists():
        raise UserError(f"{path} is missing: there is no {name!r} prompt set for this model")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not 1 <= n <= len(rows):
        raise UserError(f"n_images must be 1 to {len(rows)}, the size of {path.name}, not {n}")
    scenes = [Scene.from_dict(row["scene"]) for row in rows[:n]] if kind == "scenes" else None
    return Prompts([row["prompt"] for row in rows[:n]], scenes)
