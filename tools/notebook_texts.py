"""Fill the numbers in the text of notebooks from the rows of the full runs.

`build_readme.py` says what a mark is. The report of a full run has the same text as its notebook.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path


def built(root: Path, build: Callable[[str], str]) -> dict[Path, str]:
    """The notebooks and the reports below `root`, with the text that `build` makes."""
    found = {}
    for path in sorted(root.glob("notebooks/[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        texts = {
            cell["id"]: build("".join(cell["source"]))
            for cell in notebook["cells"]
            if cell["cell_type"] == "markdown"
        }
        found[path] = _with(notebook, texts)
        report = root / "reports" / path.stem / path.name
        if report.exists():
            found[report] = _with(json.loads(report.read_text(encoding="utf-8")), texts)
    return found


def _with(notebook: dict, texts: Mapping[str, str]) -> str:
    """The file of a notebook with other text in the cells that `texts` names."""
    for cell in notebook["cells"]:
        if cell["id"] in texts:
            cell["source"] = texts[cell["id"]].splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
