"""Finished runs as web pages: one page for each notebook, and an index of questions, answers and figures.

python -m sdcomp.study.pages reports/runs
"""

from __future__ import annotations

import json
import re
import sys
from html import escape
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from sdcomp.errors import UserError
from sdcomp.files import write_text

# nbconvert's page without scripts from the network, so that it opens offline. The notebooks have no formulas
# and no diagrams that need them.
_PAGE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>main { max-width: 68rem; margin: auto; }</style>{% endblock %}
{% block body_header %}{{ super() }}<p><a href="../index.html">All runs</a></p>{% endblock %}
"""

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
section {{ border-top: 1px solid #ccc; margin-top: 2rem; }}
small {{ color: #555; }}
pre {{ white-space: pre-wrap; font: inherit; }}
figure {{ display: inline-block; margin: 0.5rem 1rem 0.5rem 0; vertical-align: top; }}
figure img {{ height: 9rem; max-width: 18rem; object-fit: contain; display: block; }}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def drop_stderr(notebook: NotebookNode) -> None:
    """Remove stderr (progress bars, mostly) from a notebook's outputs."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def own_answer(notebook: NotebookNode) -> str:
    """What the section "The answer of this run" of a notebook prints; empty without one."""
    inside, printed = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            inside = cell.source.startswith("## The answer of this run")
        elif inside and cell.cell_type == "code":
            printed += [output.text for output in cell.outputs if output.get("name") == "stdout"]
    return "".join(printed).strip()


def write_pages(folder: Path) -> Path:
    """Write `<study>/<study>.html` for each `<study>/<study>.ipynb` below `folder`, and `index.html`.

    The notebooks lose their stderr too. Returns the index. Raises UserError where there is no run, and for an
    incomplete run.
    """
    notebooks = sorted(path for path in folder.glob("*/*.ipynb") if path.stem == path.parent.name)
    if not notebooks:
        raise UserError(f"there is no <study>/<study>.ipynb below {folder}; `make study` writes them")
    sections = "\n".join(_write_page(path) for path in notebooks)
    index = folder / "index.html"
    write_text(index, _INDEX.format(title=f"Runs in {escape(folder.name)}", sections=sections))
    return index


def _write_page(path: Path) -> str:
    """Write the page of one run; returns its section of the index."""
    try:
        notebook = nbformat.read(path, as_version=4)
        record = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, nbformat.reader.NotJSONError, json.JSONDecodeError) as error:
        raise UserError(f"the run in {path.parent} is incomplete ({error}); run it again") from None
    drop_stderr(notebook)
    write_text(path, nbformat.writes(notebook) + "\n")
    exporter = HTMLExporter(extra_loaders=[DictLoader({"page": _PAGE})], template_file="page")
    first = notebook.cells[0].source
    heading = re.match(r"# (.*)", first)
    title = heading[1].replace("`", "") if heading else path.stem
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    write_text(path.with_suffix(".html"), page)

    study = path.stem
    said = re.search(r"\*\*Question.*?(?=\*\*Run time|\Z)", first, flags=re.DOTALL)
    own = own_answer(notebook)
    figures = [
        f'<figure><a href="{study}/{figure.name}"><img src="{study}/{figure.name}" alt="{figure.stem}">'
        f"</a><figcaption><small>{figure.stem}</small></figcaption></figure>"
        for figure in sorted(path.parent.glob("*.png"))
        if figure.name in record.get("figures", [figure.name])  # the others are of an earlier run
    ]
    commit, _, modified = record["commit"].partition("-")
    commit = "-".join(part for part in (commit[:7], modified) if part)
    names = [path.name, "metrics.csv", "images.csv", "run.json"]
    files = [f'<a href="{study}/{name}">{name}</a>' for name in names if (path.parent / name).is_file()]
    return "\n".join(
        (
            f'<section>\n<h2><a href="{study}/{study}.html">{escape(title)}</a></h2>',
            markdown2html(said[0]) if said else "",
            f"<p><strong>This run.</strong></p>\n<pre>{escape(own)}</pre>" if own else "",
            f"<p><small>{record['seconds']:.0f} s on {escape(record['device'])}, commit "
            f"{escape(commit)}; {', '.join(files)}</small></p>",
            *figures,
            "</section>",
        )
    )


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise UserError("give the folder of the runs: python -m sdcomp.study.pages reports/runs")
        print(write_pages(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
