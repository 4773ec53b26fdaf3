"""The notebooks' regression test bites: a changed number, a cell that was not executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import goldens
import nbformat
import pytest
import test_repository
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
NUMBER = "9347284"
CELLS = (
    "total = 9_347_284",
    "print(total, 'parameters')",
    "import sys\nprint('50%|#####', file=sys.stderr)\n(32, 3, 64, 64)",
    "display({'image/png': 'iVBORw0KGgo='}, raw=True)",
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, list[str]]:
    """A small notebook, executed as `make goldens` does, and the diff of its outputs."""
    path = tmp_path_factory.mktemp("notebooks") / "00_small.ipynb"
    cells = [new_code_cell(source, id=f"c{i:02}") for i, source in enumerate(CELLS, start=1)]
    for cell in cells[2:]:
        cell.metadata.tags = ["nbval-ignore-output"]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Small", id="c00"), *cells]), path)
    return path, goldens.execute(path)


def copy(path: Path, name: str, change) -> Path:
    notebook = nbformat.read(path, as_version=4)
    change(notebook.cells[2])
    nbformat.write(notebook, path.with_name(name))
    return path.with_name(name)


def change_number(cell):
    cell.outputs[0].text = cell.outputs[0].text.replace(NUMBER, "9347285")


def unexecute(cell):
    cell.execution_count, cell.outputs = None, []


def test_goldens_keep_what_is_compared_and_show_what_changed(executed):
    path, diff = executed
    shown = [f"+c02: {NUMBER} parameters", "+c03 (not compared): (32, 3, 64, 64)"]
    assert diff[2:] == ["@@ -0,0 +1,2 @@", *shown]
    code = nbformat.read(path, as_version=4).cells[1:]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert [len(cell.outputs) for cell in code] == [0, 1, 1, 0]

    changed = copy(path, "shown.ipynb", change_number)
    assert [line for line in goldens.execute(changed)[3:] if line[0] in "+-"] == [
        "-c02: 9347285 parameters",
        f"+c02: {NUMBER} parameters",
    ]
    assert goldens.execute(changed) == []


def test_a_changed_number_fails(executed):
    path, _ = executed
    changed = copy(path, "changed.ipynb", change_number)
    command = [sys.executable, "-m", "pytest", "-rA", "--nbval", "--nbval-current-env", path, changed]
    result = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=120)
    assert "1 failed, 7 passed" in result.stdout
    assert "FAILED changed.ipynb::Cell 1" in result.stdout


def test_a_cell_that_was_not_executed_is_refused(executed):
    # nbval itself compares nothing in such a cell.
    path, _ = executed
    check = test_repository.test_notebook_is_committed_executed_at_its_defaults_and_without_images
    check(path)
    with pytest.raises(AssertionError):
        check(copy(path, "unexecuted.ipynb", unexecute))


def test_make_test_compares_every_notebook():
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in plan.splitlines() if "--nbval " in line)
    notebooks = {str(path.relative_to(ROOT)) for path in ROOT.glob("notebooks/*.ipynb")}
    assert notebooks and notebooks <= set(command.split())
