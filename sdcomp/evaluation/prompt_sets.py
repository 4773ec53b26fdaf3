"""The prompts of the studies, and the scenes that they describe, if known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdcomp.errors import UserError
from sdcomp.files import regular, resolve_input
from sdcomp.model import StableDiffusion
from sdcomp.model.generate_arguments import as_texts
from sdcomp.scenes import Scene

FOLDER = Path("data/prompts")


@dataclass(frozen=True)
class Prompts:
    """Prompts: their texts, and for the tiny model their scenes, else None."""

    texts: list[str]
    scenes: list[Scene] | None = None

    @property
    def groups(self) -> list[str]:
        """The group of each prompt: its scene, else its text. Images of one group are not independent."""
        return self.texts if self.scenes is None else [repr(scene) for scene in self.scenes]

    def subset(self, rows: Sequence[int]) -> Prompts:
        """The prompts with these indices, in this order."""
        scenes = None if self.scenes is None else [self.scenes[i] for i in rows]
        return Prompts([self.texts[i] for i in rows], scenes)

    def __len__(self) -> int:
        return len(self.texts)


def load_prompts(sd: StableDiffusion, name: str, n: int) -> Prompts:
    """Load the first `n` prompts of a set ("test", "calibration", "final", "unseen") or of a file.

    The sets are disjoint files in `data/prompts`; only the tiny model has "final" and "unseen". Your own
    file is a `.txt` with one prompt a line, or a `.jsonl` with lines like `{"prompt": "..."}`. Raises
    UserError for a set with fewer prompts, and for a file that is missing or has another form.
    """
    kind = "scenes" if sd.reader is not None else "sd15"
    path = resolve_input(name if name.endswith((".txt", ".jsonl")) else FOLDER / f"{kind}_{name}.jsonl")
    if not path.exists():
        raise UserError(f"{path} is missing: there is no {name!r} prompt set for this model")
    regular(path)  # opening a pipe would block
    try:
        # Spaces at the ends do not change a prompt, and would hide that two lines are the same.
        text = path.read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) if path.suffix == ".jsonl" else {"prompt": line} for line in lines]
        texts = as_texts("prompt", [row["prompt"] for row in rows])
        scenes = [Scene.from_dict(row["scene"]) if "scene" in row else None for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path} is no prompt file: each line must be like {{"prompt": "..."}} ({error})'
        ) from None
    if not 1 <= n <= len(rows):
        has = "1 prompt" if len(rows) == 1 else f"{len(rows)} prompts"
        raise UserError(f"{path.name} has {has}: ask for 1 to {len(rows)}, not for {n}")
    return Prompts(texts[:n], scenes[:n] if None not in scenes and sd.reader is not None else None)
