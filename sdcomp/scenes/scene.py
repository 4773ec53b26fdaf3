"""Scenes: one or two coloured shapes on a background, how they are drawn at random, and their splits.

A scene is what a caption says, no more; where the shapes stand, how they are lit and turned is left to
the renderer. Splits are by content, not by wording: a scene of the test split is never seen in training
under any caption, and some combinations of shape, colour and texture are never seen at all ("unseen").
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
BACKGROUNDS = ("navy", "teal", "gray", "brown")
RELATIONS = ("left", "above")
SPLITS = ("train", "test", "unseen")


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    color: str
    size: str
    texture: str

    @property
    def unseen(self) -> bool:
        """Whether training never shows this combination of shape, colour and texture (6 of 72)."""
        i = SHAPES.index(self.shape)
        return COLORS[(i + 2) % len(COLORS)] == self.color and TEXTURES[i % 2] == self.texture


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first is `relation` ("left" of, "above") the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def split(self) -> str:
        """Held-out combinations are "unseen", one scene in ten of the rest "test", all others "train"."""
        if any(thing.unseen for thing in self.things):
            return "unseen"
        digest = hashlib.sha256(repr(sorted(self.attributes().items())).encode()).digest()
        return "test" if digest[0] % 10 == 0 else "train"

    def attributes(self) -> dict[str, str]:
        """Everything that the scene says, by name: background, count, relation, shape_1, color_1, ..."""
        values = {"background": self.background, "count": str(len(self.things))}
        if self.relation is not None:
            values["relation"] = self.relation
        for i, thing in enumerate(self.things, start=1):
            values.update({f"{name}_{i}": value for name, value in asdict(thing).items()})
        return values

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain containers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scene:
        """The inverse of `to_dict`."""
        return cls(values["background"], tuple(Thing(**t) for t in values["things"]), values["relation"])


def sample_scenes(n: int, seed: int, split: str = "train", objects: int | None = None) -> list[Scene]:
    """Draw `n` scenes of a split, with repetition; `objects` 1 or 2, or None for 40 % of one.

    Raises ValueError for a split or a number of objects that does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be 1, 2 or None, not {objects!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split)])

    def pick(values: tuple[str, ...]) -> str:
        return values[rng.integers(len(values))]

    scenes: list[Scene] = []
    while len(scenes) < n:
        count = objects or (1 if rng.random() < 0.4 else 2)
        things = tuple(Thing(pick(SHAPES), pick(COLORS), pick(SIZES), pick(TEXTURES)) for _ in range(count))
        scene = Scene(pick(BACKGROUNDS), things, pick(RELATIONS) if count == 2 else None)
        if scene.split == split:
            scenes.append(scene)
    return scenes


def neighbor(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene, of any split, that differs in one thing said: an attribute changed, or two swapped.

    Such pairs are what a contrastive model must tell apart (Yuksekgonul et al. 2023, hard negatives).
    """
    while (other := _change(scene, rng)) == scene:
        pass
    return other


def _change(scene: Scene, rng: np.random.Generator) -> Scene:
    things = list(scene.things)
    choice = rng.integers(6)
    if choice == 0:
        return replace(scene, background=str(rng.choice(BACKGROUNDS)))
    if choice == 1 and len(things) == 2:
        a, b = things
        swapped = (
            (b, a),
            (replace(a, color=b.color), replace(b, color=a.color)),
            (replace(a, shape=b.shape), replace(b, shape=a.shape)),
        )
        return replace(scene, things=swapped[rng.integers(3)])
    if choice == 2 and len(things) == 2:
        return replace(scene, relation=str(rng.choice(RELATIONS)))
    name, values = [("shape", SHAPES), ("color", COLORS), ("size", SIZES), ("texture", TEXTURES)][
        rng.integers(4)
    ]
    k = rng.integers(len(things))
    things[k] = replace(things[k], **{name: str(rng.choice(values))})
    return replace(scene, things=tuple(things))
