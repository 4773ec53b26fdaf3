"""The README and the committed notebooks keep their promises."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_reports():
    builder = _load(ROOT / "reports" / "build_readme.py")
    for path in builder.PAGES:
        text = path.read_text(encoding="utf-8")
        assert builder.build(text) == text, f"run reports/build_readme.py: {path.name} is out of date"


def test_prompt_sets_are_what_their_script_makes():
    maker = _load(ROOT / "data" / "prompts" / "make_prompts.py")
    for name, (split, n, seed) in maker.SETS.items():
        path = ROOT / "data" / "prompts" / f"scenes_{name}.jsonl"
        assert path.read_text(encoding="utf-8") == maker.make(split, n, seed)


def test_readme_python_snippets_run(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert "torch.Size([1, 3, 64, 64]) 29.8% zero" in capsys.readouterr().out


def test_what_readme_links_to_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_executed_at_its_defaults_and_without_images(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "papermill" not in notebook.metadata
    assert "image/png" not in json.dumps([cell.outputs for cell in code])
    assert not any(cell.source.startswith("# Parameters") for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_question_then_parameters_then_their_check(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(
        word in cells[0].source for word in ("**Question.**", "**Answer", "**Run time.**", "papermill ")
    )
    assert cells[1].metadata.tags == ["parameters"]
    for line, node in zip(cells[1].source.splitlines(), ast.parse(cells[1].source).body, strict=True):
        ast.literal_eval(node.value)
        assert isinstance(node, ast.AnnAssign)
        assert "  # " in line
    assert f'Run("{path.stem}", globals())' in cells[2].source


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/profiles/*.yaml")), ids=lambda p: p.stem)
def test_profile_only_sets_parameters_that_its_notebook_has(path):
    name = "01_quantization" if path.stem == "published" else path.stem
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    known = {node.target.id for node in ast.parse(cells[1].source).body}
    named = set(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named and named <= known
