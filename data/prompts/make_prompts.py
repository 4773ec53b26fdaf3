"""Write the scene prompt sets beside this file anew: `python data/prompts/make_prompts.py`."""

from __future__ import annotations

import json
from pathlib import Path

from sdcomp.scenes import captions, sample_scenes

SETS = {
    "test": ("test", 512, 100, slice(0, 256)),
    "final": ("test", 512, 100, slice(256, 512)),
    "unseen": ("unseen", 256, 200, slice(256)),
    "calibration": ("train", 512, 300, slice(512)),
}
"""Name: split, number of prompts that are drawn, seed, which of them. No choice is ever made on "final"."""


def make(split: str, n: int, seed: int, rows: slice) -> str:
    """Return JSON lines: `rows` of `n` distinct prompts of a split, one object and two in turn."""
    pools = []
    for objects in (1, 2):
        scenes = sample_scenes(4 * n, seed + objects - 1, split, objects)
        pools.append(iter(zip(scenes, captions(scenes, seed + objects - 1), strict=True)))
    lines: dict[str, str] = {}
    while len(lines) < n:
        scene, prompt = next(pair for pair in pools[len(lines) % 2] if pair[1] not in lines)
        lines[prompt] = json.dumps({"prompt": prompt, "scene": scene.to_dict()}) + "\n"
    return "".join(list(lines.values())[rows])


if __name__ == "__main__":
    for name, drawn in SETS.items():
        Path(__file__).with_name(f"scenes_{name}.jsonl").write_text(make(*drawn), encoding="utf-8")
