"""The files of the tiny model and of the prompts, for the README of `data`."""

from __future__ import annotations

from pathlib import Path

from sdcomp.files import sha256


def rows(folder: Path) -> list[list[str]]:
    """Size and sha256 of each file in a folder of `data`; the first row is the head of the table."""
    found = [["file", "bytes", "sha256"]]
    kinds = (".safetensors", ".json", ".jsonl", ".txt")
    for path in sorted(file for file in folder.iterdir() if file.suffix in kinds):
        found.append([f"`{path.name}`", f"{path.stat().st_size:,}", f"`{sha256(path)}`"])
    return found
