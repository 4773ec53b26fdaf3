"""The files of the tiny model and of the prompts, for the README of `data`."""

from __future__ import annotations

import hashlib
from pathlib import Path


def rows(folder: Path) -> list[list[str]]:
    """Size and sha256 of each file in a folder of `data`; the first row is the head of the table."""
    found = [["file", "bytes", "sha256"]]
    kinds = (".safetensors", ".json", ".jsonl", ".txt")
    for path in sorted(file for file in folder.iterdir() if file.suffix in kinds):
        content = path.read_bytes()
        found.append([f"`{path.name}`", f"{len(content):,}", f"`{hashlib.sha256(content).hexdigest()}`"])
    return found
