"""Scenes: one or two coloured shapes on a background; random scenes, and their splits.

A scene holds exactly what a caption says. The renderer chooses the rest: exact places, light and tilt.
Splits go by content, not by wording: training never shows a scene of the test split under any caption, and
it never shows some combinations of shape, colour and texture at all (the split "unseen").
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
        """Whether this combination of shape, colour and texture is never in training (6 of 72 are not)."""
        i = SHAPES.index(self.shape)
        return COLORS[(i + 2) % len(COLORS)] == self.color and TEXTURES[i % 2] == self.texture


@dataclass(frozen=True)
class Scene:
    """One object, or two; then the first is left of or above the second (`relation`: "left", "above")."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def split(self) -> str:
        """The split: "unseen" for held-out combinations; of the rest one in ten "test", else "train"."""
        if any(thing.unseen for thing in self.things):
            return "unseen"
        digest = hashlib.sha256(repr(sorted(self.attributes().items())).encode()).digest()
        return "test" if digest[0] % 10 == 0 else "train"

    def attributes(self) -> dict[str, str]:
        """All attributes of the scene by name: background, count, relation, shape_1, color_1, ..."""
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
    """Draw `n` random scenes of a split, with repetition.

    `objects` is the number of objects, 1 or 2; None draws 40 % of the scenes with one. Raises ValueError
    for another split or number of objects.
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
    """Draw a scene, of any split, that differs in one point: one attribute changed, or two swapped.

    A contrastive model must tell such pairs apart (Yuksekgonul et al. 2023, hard negatives).
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
