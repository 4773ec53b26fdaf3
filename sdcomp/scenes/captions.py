"""Captions of scenes: a small grammar with several wordings, and its vocabulary."""

from __future__ import annotations

import re

import numpy as np

from sdcomp.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, Scene, Thing

RELATION_WORDINGS = {"left": ("left of", "to the left of"), "above": ("above", "directly above")}
BACKGROUND_WORDINGS = ("on a {} background", "against a {} background", "on {}")

VOCABULARY = tuple(
    sorted(
        {
            *SHAPES,
            *COLORS,
            *SIZES,
            *TEXTURES,
            *BACKGROUNDS,
            "a",
            "an",
            "and",
            "with",
            "stripes",
            "scene",
            "of",
        }
        | {word for wordings in RELATION_WORDINGS.values() for w in wordings for word in w.split()}
        | {word for w in BACKGROUND_WORDINGS for word in re.findall("[a-z]+", w)}
    )
)
"""Every word of the captions and a few more; each is one token of the tiny model's tokenizer."""


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Write a caption of `scene`, in the first wording of each part.

    With `rng` the wording is random: the word "plain" may be left out or not, stripes come before or after
    the noun, and the relation and the background have several wordings.
    """

    def choose(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else options[rng.integers(len(options))]

    def describe(thing: Thing) -> str:
        noun = f"{thing.color} {thing.shape}"
        if thing.texture == "plain":
            texts = (f"a {thing.size} {noun}", f"a {thing.size} plain {noun}")
        else:
            texts = (f"a {thing.size} striped {noun}", f"a {thing.size} {noun} with stripes")
        return choose(texts)

    text = describe(scene.things[0])
    if scene.relation is not None:
        text += f" {choose(RELATION_WORDINGS[scene.relation])} {describe(scene.things[1])}"
    return f"{text} {choose(BACKGROUND_WORDINGS).format(scene.background)}"


def captions(scenes: list[Scene], seed: int) -> list[str]:
    """One caption for each scene, in random wordings drawn from `seed`."""
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for scene in scenes]
