"""The rendered training set of the tiny model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdcomp.files import replacing
from sdcomp.scenes import Scene, neighbor, render, sample_scenes
from sdcomp.scenes.render import SIZE

FAMILY = 4
"""Scenes come in families: a random scene, and three that differ from it in one point."""


@dataclass
class SceneSet:
    """Scenes and their images: `images` is `(N, 3, 64, 64)` uint8."""

    scenes: list[Scene]
    images: np.ndarray

    @property
    def digest(self) -> str:
        """A short hash of these scenes and their images: 12 hexadecimal digits."""
        return hashlib.sha256(repr(self.scenes).encode() + self.images[:FAMILY].tobytes()).hexdigest()[:12]

    def batch(self, rows: np.ndarray) -> Tensor:
        """The images with these indices, `(B, 3, 64, 64)` float32 in [0, 1]."""
        return torch.from_numpy(self.images[rows]).float() / 255


def scene_set(n: int, seed: int, folder: Path | None = None, progress: bool = True) -> SceneSet:
    """Draw `n` training scenes and render them; a `folder` keeps the images for the next call.

    Images that are in `folder` are mapped, not rendered. Raises ValueError unless `n` is a multiple of 4.
    """
    if n % FAMILY:
        raise ValueError(f"n must be a multiple of {FAMILY}, not {n}")
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    for scene in sample_scenes(n // FAMILY, seed):
        scenes.append(scene)
        while len(scenes) % FAMILY:
            other = neighbor(scene, rng)
            if other.split == "train":
                scenes.append(other)

    path = None if folder is None else folder / f"scenes-{n}-{seed}.npy"
    if path is None or not path.exists():
        images = np.empty((n, 3, SIZE, SIZE), np.uint8)
        for i in tqdm(range(0, n, 256), desc="render", disable=not progress):
            batch = render(scenes[i : i + 256], [[seed, j] for j in range(i, min(i + 256, n))])
            images[i : i + 256] = (batch * 255).round().byte().numpy()
        if path is None:
            return SceneSet(scenes, images)
        with replacing(path) as partial, open(partial, "wb") as file:
            np.save(file, images)
    return SceneSet(scenes, np.load(path, mmap_mode="r"))
