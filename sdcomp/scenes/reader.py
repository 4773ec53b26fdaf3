"""The reader: a small network that reads the scene from an image, or says that it cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdcomp.scenes.render import SIZE
from sdcomp.scenes.scene import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, TEXTURES, Scene

HEADS: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "count": ("1", "2"),
    "relation": RELATIONS,
    **{
        f"{name}_{k}": values
        for k in (1, 2)
        for name, values in {"shape": SHAPES, "color": COLORS, "size": SIZES, "texture": TEXTURES}.items()
    },
}
"""The attributes that are read, and their values. Each head has one more class, the last: cannot tell."""

UNKNOWN = "?"
"""The answer of `SceneReader.read` for an attribute that it cannot tell."""


class SceneReader(nn.Module):
    """A small convolutional network with one classifier for each attribute.

    `forward(images)`: `(B, 3, 64, 64)` in [0, 1] -> logits by head, each `(B, values + 1)`.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def stage(inp: int, out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        self.features = nn.Sequential(
            *stage(3, width, 2),
            *stage(width, 2 * width, 1),
            *stage(2 * width, 3 * width, 2),
            *stage(3 * width, 3 * width, 1),
            *stage(3 * width, 4 * width, 2),
            *stage(4 * width, 4 * width, 1),
            nn.Conv2d(4 * width, width, 1),
            nn.Flatten(),
            nn.Linear(width * (SIZE // 8) ** 2, 256),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(v) + 1) for name, v in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(2 * images - 1)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor, threshold: float = 0.5, batch_size: int = 256) -> list[dict[str, str]]:
        """Read images `(N, 3, 64, 64)` in [0, 1] -> one dictionary each, in the form of `Scene.attributes`.

        An attribute is "?" if the network says that it cannot tell, or if the most likely value has a
        probability below `threshold`. If the image shows one object, `relation` and the second object's
        attributes are left out. Raises ValueError for images of another size or type.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"the reader takes images (N, 3, {SIZE}, {SIZE}), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError("images must be floating point in [0, 1]")
        device = next(self.parameters()).device
        answers: list[dict[str, str]] = [{} for _ in range(len(images))]
        for start in range(0, len(images), batch_size):
            logits = self(images[start : start + batch_size].to(device).float())
            for name, values in HEADS.items():
                best, index = logits[name].softmax(-1).max(-1)
                for row, (p, i) in enumerate(zip(best.tolist(), index.tolist(), strict=True), start=start):
                    answers[row][name] = values[i] if i < len(values) and p >= threshold else UNKNOWN
        for answer in answers:
            if answer["count"] == "1":
                for name in [n for n in answer if n == "relation" or n.endswith("_2")]:
                    del answer[name]
        return answers


def head_targets(scenes: list[Scene | None]) -> dict[str, Tensor]:
    """Target classes for each head, `(N,)` int64; None stands for an image without a scene."""
    rows = [{} if scene is None else scene.attributes() for scene in scenes]
    return {
        name: torch.tensor([values.index(r[name]) if name in r else len(values) for r in rows])
        for name, values in HEADS.items()
    }


@dataclass
class PromptAccuracy:
    """Whether images show the scenes of their prompts, `(N,)` each.

    `all_right`: bool, True if every attribute is right. `by_attribute`: for each kind of attribute, the
    share of an image's objects in which it is right; NaN if the scene has no such attribute, as a single
    object has no relation.
    """

    all_right: Tensor
    by_attribute: dict[str, Tensor]


def prompt_accuracy(reader: SceneReader, images: Tensor, scenes: list[Scene]) -> PromptAccuracy:
    """Read `images` `(N, 3, 64, 64)` in [0, 1] and compare them with the scenes of their prompts."""
    names = sorted({name.split("_")[0] for name in HEADS})
    by_attribute = {name: torch.full((len(scenes),), float("nan")) for name in names}
    all_right = torch.zeros(len(scenes), dtype=torch.bool)
    for row, (answer, scene) in enumerate(zip(reader.read(images), scenes, strict=True)):
        wanted = scene.attributes()
        all_right[row] = answer == wanted
        for name in names:
            right = [answer.get(k) == v for k, v in wanted.items() if k.split("_")[0] == name]
            if right:
                by_attribute[name][row] = sum(right) / len(right)
    return PromptAccuracy(all_right, by_attribute)
