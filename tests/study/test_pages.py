"""Finished runs as web pages."""

from __future__ import annotations

import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sdcomp.errors import UserError
from sdcomp.files import ROOT
from sdcomp.study.pages import write_pages

COMMITTED = sorted(path / f"{path.name}.ipynb" for path in ROOT.glob("reports/[0-9][0-9]_*"))
FIRST = """# 02 · Pruning: `amount` < 1 & more

**Question.** How much of `amount`?

**Answer (last full run).** It depends:

- zeroed: 45 % [40, 50]

**Run time.** A minute.

**Command.**
```
papermill
```"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


class Links(HTMLParser):
    """What a page links to or shows."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value for name, value in attrs if name in ("href", "src") and value[0] != "#"}


@pytest.fixture
def runs(tmp_path) -> Path:
    folder = tmp_path / "02_pruning"
    (folder / "e2308127d25a").mkdir(parents=True)
    outputs = [
        new_output("stream", name="stderr", text="generate:  50%|#####"),
        new_output("stream", name="stdout", text="9347284 parameters"),
        new_output("display_data", data={"image/png": PIXEL}),
    ]
    answer = [new_output("stream", name="stdout", text="30 % < 35 %: no loss is shown.\n")]
    cells = [
        new_markdown_cell(FIRST), new_code_cell("draw()", execution_count=1, outputs=outputs),
        new_markdown_cell("## The answer of this run"), new_code_cell("say()", outputs=answer),
        new_markdown_cell("## Reading"), new_code_cell("more()"),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), folder / "02_pruning.ipynb")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "seconds": 47.2,
                "device": "CPU <1>",
                "commit": "0123456789-modified",
                "figures": ["quality.png"],
            }
        )
    )
    (folder / "metrics.csv").touch()
    (folder / "quality.png").touch()
    (folder / "earlier.png").touch()  # of another run in this folder
    return tmp_path


def test_index_says_what_a_run_asks_and_answers_and_links_to_all_of_it(runs):
    index = write_pages(runs)
    text = index.read_text(encoding="utf-8")
    assert "02 · Pruning: amount &lt; 1 &amp; more" in text
    assert "<strong>Question.</strong> How much of <code>amount</code>?" in text
    assert "<strong>Answer (last full run).</strong> It depends:" in text
    assert "<li>zeroed: 45 % [40, 50]</li>" in text
    assert "<pre>30 % &lt; 35 %: no loss is shown.</pre>" in text and "9347284" not in text
    assert "A minute" not in text and "papermill" not in text
    assert "47 s on CPU &lt;1&gt;, commit 0123456-modified;" in text
    assert "earlier.png" not in text
    names = ("02_pruning.html", "02_pruning.ipynb", "metrics.csv", "run.json", "quality.png")
    assert Links(index).found == {f"02_pruning/{name}" for name in names}
    assert all((runs / link).exists() for link in Links(index).found)


def test_page_has_the_outputs_and_needs_nothing_else(runs):
    write_pages(runs)
    page = runs / "02_pruning" / "02_pruning.html"
    text = page.read_text(encoding="utf-8")
    assert "9347284 parameters" in text and "50%|" not in text
    assert Links(page).found == {"../index.html", f"data:image/png;base64,{PIXEL}"}
    assert not re.search(r"@import|<script", text)


def test_notebook_keeps_everything_but_its_progress_bars(runs):
    path = runs / "02_pruning" / "02_pruning.ipynb"
    before = nbformat.read(path, as_version=4)
    write_pages(runs)
    once = path.read_bytes()
    write_pages(runs)
    assert path.read_bytes() == once
    after = nbformat.read(path, as_version=4)
    del before.cells[1].outputs[0]
    assert after == before


def test_a_folder_without_runs_and_a_run_that_is_not_whole_are_named(runs):
    with pytest.raises(UserError, match="no <study>/<study>.ipynb below .*e2308127d25a"):
        write_pages(runs / "02_pruning" / "e2308127d25a")
    (runs / "02_pruning" / "run.json").unlink()
    with pytest.raises(UserError, match="02_pruning is incomplete .*run it again"):
        write_pages(runs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give the folder of the runs: "),
        (["/nonexistent"], "there is no <study>/<study>.ipynb below /non"),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pages", *arguments])
    with pytest.raises(SystemExit, match=f"^{sentence}") as caught:
        runpy.run_path(str(ROOT / "sdcomp" / "study" / "pages.py"), run_name="__main__")
    assert "\n" not in caught.value.code  # printed to stderr, and the exit status is 1


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_run_is_whole_and_small(path):
    outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    committed = [file for file in path.parent.iterdir() if file.suffix in (".ipynb", ".png", ".csv", ".json")]
    assert sum(file.stat().st_size for file in committed) < 40e6 / 6
