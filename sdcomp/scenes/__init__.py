"""Captioned scenes: the training data of the tiny model, and the reader that judges its images."""

from sdcomp.scenes.captions import VOCABULARY, caption, captions
from sdcomp.scenes.reader import SceneReader, prompt_accuracy
from sdcomp.scenes.render import render
from sdcomp.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    neighbor,
    sample_scenes,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "VOCABULARY",
    "Scene",
    "SceneReader",
    "Thing",
    "caption",
    "captions",
    "neighbor",
    "prompt_accuracy",
    "render",
    "sample_scenes",
]
