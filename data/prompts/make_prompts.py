"""Write the scene prompt sets beside this file anew: `python data/prompts/make_prompts.py`."""

from __future__ import annotations

import json
from pathlib import Path

from sdcomp.scenes import captions, sample_scenes

SETS = {"test": ("test", 512, 100), "unseen": ("unseen", 256, 200), "calibration": ("train", 512, 300)}
"""Name: split, number of prompts, seed."""


def make(split: str, n: int, seed: int) -> str:
    """JSON lines of `n` distinct prompts of a split, one object and two in turn."""
    pools = []
    for objects in (1, 2):
        scenes = sample_scenes(4 * n, seed + objects - 1, split, objects)
        pools.append(iter(zip(scenes, captions(scenes, seed + objects - 1), strict=True)))
    lines: dict[str, str] = {}
    while len(lines) < n:
        scene, prompt = next(pair for pair in pools[len(lines) % 2] if pair[1] not in lines)
        lines[prompt] = json.dumps({"prompt": prompt, "scene": scene.to_dict()}) + "\n"
    return "".join(lines.values())


if __name__ == "__main__":
    for name, (split, n, seed) in SETS.items():
        Path(__file__).with_name(f"scenes_{name}.jsonl").write_text(make(split, n, seed), encoding="utf-8")
