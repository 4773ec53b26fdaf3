"""Deterministic rendering of scenes: 64x64 RGB, anti-aliased by signed distances, softly lit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sdcomp.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing

SIZE = 64
"""Side of a rendered image, in pixels."""

_RADIUS = {"small": 8.5, "large": 12.5}
_COLOR = {
    "red": (0.87, 0.16, 0.17), "orange": (0.96, 0.52, 0.11), "yellow": (0.97, 0.87, 0.20),
    "green": (0.20, 0.68, 0.27), "blue": (0.22, 0.45, 0.96), "purple": (0.61, 0.26, 0.76),
}  # fmt: skip
_BACKGROUND = {
    "navy": (0.08, 0.10, 0.31), "teal": (0.03, 0.38, 0.40),
    "gray": (0.44, 0.45, 0.46), "brown": (0.36, 0.23, 0.13),
}  # fmt: skip
_STRIPE_PERIOD = 6.0

_ABSENT = Thing(SHAPES[0], COLORS[0], SIZES[0], "plain")
"""Drawn with no coverage for a scene without objects in a batch with objects."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.62, math.sqrt(0.75) * x.abs() - 0.5 * y - 0.46)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane into one of ten equal wedges; there the outline is one straight edge.
    wedge = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + wedge / 2, wedge) - wedge / 2).abs()
    radius = torch.hypot(x, y)
    inner = (0.45 * math.cos(wedge / 2), 0.45 * math.sin(wedge / 2))
    length = math.hypot(1 - inner[0], inner[1])
    return ((radius * angle.cos() - 1) * inner[1] + radius * angle.sin() * (1 - inner[0])) / length


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.minimum(x, y) - 0.3, torch.maximum(x, y) - 0.92)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.66).abs() - 0.28


# Signed distance to each shape's outline, in radii, negative inside; y points down.
_DISTANCE = {
    "circle": _circle, "square": _square, "triangle": _triangle,
    "star": _star, "cross": _cross, "ring": _ring,
}  # fmt: skip

_CENTERS = {
    None: [((32.0, 32.0), (7.0, 7.0))],
    "left": [((16.5, 32.0), (1.5, 5.0)), ((47.5, 32.0), (1.5, 5.0))],
    "above": [((32.0, 16.5), (5.0, 1.5)), ((32.0, 47.5), (5.0, 1.5))],
}


def render(scenes: list[Scene], seed: int | list[int]) -> Tensor:
    """Render scenes -> `(N, 3, 64, 64)` float32 in [0, 1].

    Place, tilt, tints and light are drawn from `seed` and the scene's index, or, if `seed` is a list, from
    each scene's own seed.
    """
    seeds = seed if isinstance(seed, list) else [[seed, i] for i in range(len(scenes))]
    rngs = [np.random.default_rng(s) for s in seeds]

    def jitter(*shape: int) -> Tensor:
        """Uniform in [-1, 1], `(N, *shape, 1, 1)`."""
        values = np.stack([rng.uniform(-1, 1, shape) for rng in rngs])
        return torch.from_numpy(values).float().reshape(len(scenes), *shape, 1, 1)

    rows = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(rows, rows, indexing="ij")

    base = _table(_BACKGROUND, [BACKGROUNDS.index(s.background) for s in scenes], BACKGROUNDS)
    slope = jitter(2)
    gradient = (slope[:, :1] * (x - 32) + slope[:, 1:] * (y - 32)) / 32
    images = base * (1 + 0.05 * jitter(3)) * (1 + 0.15 * gradient)

    for k in range(max(len(s.things) for s in scenes)):
        offset, tilt, scale, tint, light = jitter(2), jitter(1), jitter(1), jitter(3), jitter(1)
        present = torch.tensor([len(s.things) > k for s in scenes])
        things = [s.things[min(k, len(s.things) - 1)] if s.things else _ABSENT for s in scenes]
        places = torch.tensor([_CENTERS[s.relation][min(k, len(s.things) - 1)] for s in scenes])
        center = places[:, 0, :, None, None] + places[:, 1, :, None, None] * offset
        radius = torch.tensor([_RADIUS[t.size] for t in things])[:, None, None] + 0.5 * scale[:, 0]
        tilt = math.radians(8) * tilt[:, 0]

        dx, dy = (x - center[:, 0]) / radius, (y - center[:, 1]) / radius
        u = dx * tilt.cos() + dy * tilt.sin()
        v = dy * tilt.cos() - dx * tilt.sin()
        distance = torch.empty_like(u)
        for shape in SHAPES:
            rows_of_shape = torch.tensor([t.shape == shape for t in things])
            distance[rows_of_shape] = _DISTANCE[shape](u[rows_of_shape], v[rows_of_shape])
        coverage = (0.5 - distance * radius).clamp(0, 1) * present[:, None, None]

        color = _table(_COLOR, [COLORS.index(t.color) for t in things], COLORS) * (1 + 0.06 * tint)
        color = color * (1 - (0.16 + 0.06 * light) * (dx + dy)[:, None] / math.sqrt(2))
        # Distance in pixels to the middle of the nearest coloured band; the bands are diagonal.
        band = torch.remainder((dx + dy) * radius / math.sqrt(2) + _STRIPE_PERIOD / 4, _STRIPE_PERIOD)
        white = ((band - 0.75 * _STRIPE_PERIOD).abs() * -1 + _STRIPE_PERIOD / 4 + 0.5).clamp(0, 1)
        striped = torch.tensor([t.texture == "striped" for t in things])
        white = 0.75 * (white * striped[:, None, None])[:, None]
        color = color * (1 - white) + white
        images = images * (1 - coverage[:, None]) + color * coverage[:, None]
    return images.clamp(0, 1)


def _table(values: dict[str, tuple[float, ...]], rows: list[int], order: tuple[str, ...]) -> Tensor:
    return torch.tensor([values[name] for name in order])[rows][:, :, None, None]
