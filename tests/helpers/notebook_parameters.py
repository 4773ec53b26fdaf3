"""The notebooks, and what their parameter cells define."""

from __future__ import annotations

import nbformat

from sdcomp.files import ROOT

NOTEBOOKS = {path.stem: path for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))}


def parameters_cell(study: str) -> str:
    cells = nbformat.read(NOTEBOOKS[study], as_version=4).cells
    (source,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return source


def namespace(study: str, **injected: object) -> dict:
    """The globals of a notebook when its third cell runs."""
    source = parameters_cell(study)
    found: dict = {}
    exec(source, found)
    names = "\n".join(f"{name} = None" for name in injected)
    return {**found, **injected, "In": ["", source, f"# Parameters\n{names}", ""]}
