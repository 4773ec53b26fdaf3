"""Execute the notebooks in place at their default parameters, and show what changed in their outputs.

Images, progress bars and run-time metadata are left out: images live in reports/.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from sdcomp.study.pages import drop_stderr

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def outputs_as_text(notebook: NotebookNode) -> list[str]:
    """The lines that its code cells print and show, each after its cell's name."""
    lines = []
    for cell in notebook.cells:
        ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
        name = f"{cell.id} (not compared)" if ignored else cell.id
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            lines.extend(f"{name}: {line}" for line in text.splitlines())
    return lines


def execute(path: Path) -> list[str]:
    """Run one notebook from its own folder, as nbval does, and write it back.

    Returns a diff of its outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    before = outputs_as_text(notebook)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(path.parent)}}).execute()
    drop_stderr(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if "image/png" not in o.get("data", {})]
    nbformat.write(notebook, path)
    names = (f"{path.name} before", f"{path.name} now")
    return list(difflib.unified_diff(before, outputs_as_text(notebook), *names, lineterm=""))


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    for path in chosen:
        print(path.name, flush=True)
        print("\n".join(execute(path) or ["  outputs as before"]), flush=True)
