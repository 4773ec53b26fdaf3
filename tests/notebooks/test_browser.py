"""JupyterLab as people use it: a browser opens a notebook, runs all cells, and shows bars and figures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from checkout import checkout
from websocket import create_connection

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TOKEN = "secret"

OUTPUTS = ".jp-OutputArea-output"
ERRORS = f"[...document.querySelectorAll('{OUTPUTS}[data-mime-type*=error]')].map(e => e.innerText)"
BARS = f"[...document.querySelectorAll('{OUTPUTS}[data-mime-type*=stderr]')].map(e => e.innerText).join('')"
FIGURES = f"[...document.querySelectorAll('{OUTPUTS} img')].filter(e => e.naturalWidth > 300).length"
KERNEL = "document.querySelector('.jp-Toolbar-kernelName')?.innerText"
STATUS = "document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status"
EXECUTED = "document.querySelector('.jp-Notebook-ExecutionIndicator').textContent"


class Page:
    """A browser's page, over the DevTools protocol."""

    def __init__(self, address: str, pictures: Path) -> None:
        self.socket = create_connection(address, suppress_origin=True, timeout=60)
        self.pictures = pictures
        self.calls = 0

    def call(self, method: str, **parameters) -> dict:
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60):
        """The value of a JavaScript expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression}: see {self.picture('waiting')}"
            time.sleep(0.2)
        return value

    def click(self, selector: str, text: str) -> None:
        """Click on the middle of the element that has this text."""
        x, y = self.wait_for(
            f"""[...document.querySelectorAll({selector!r})].filter(e => e.innerText.trim() == {text!r})
                .map(e => e.getBoundingClientRect()).map(r => [r.x + r.width / 2, r.y + r.height / 2])[0]"""
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, name: str) -> Path:
        path = self.pictures / f"{name}.png"
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path


@contextmanager
def running(command: list[str], log: Path, **options) -> Iterator[subprocess.Popen]:
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def fetch(make, process: subprocess.Popen, log: Path, seconds: float = 120):
    """What `make` returns as soon as the process that it asks is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return make()
        except (OSError, IndexError, ValueError):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.fixture
def lab(tmp_path) -> Iterator[tuple[str, Path]]:
    """Address and root folder of a JupyterLab in a copy of the repository, with a user's first settings."""
    copy, home, log = tmp_path / "copy", tmp_path / "home", tmp_path / "lab.log"
    copy.mkdir()
    home.mkdir()
    environment = checkout(copy) | {"HOME": str(home)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with running(command, log, cwd=copy, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        fetch(lambda: urllib.request.urlopen(f"{url}/api?token={TOKEN}").close(), process, log)
        yield url, copy


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on the PATH: {', '.join(BROWSERS)}")
    profile, log = tmp_path / "profile", tmp_path / "browser.log"
    options = ["--headless", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,9000"]
    options += [f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []

    def address() -> str:
        port = int((profile / "DevToolsActivePort").read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            (found,) = (p["webSocketDebuggerUrl"] for p in json.load(answer) if p["type"] == "page")
        return found

    with running([browser, *options, "about:blank"], log) as process:
        yield Page(fetch(address, process, log), tmp_path)


@pytest.mark.slow
def test_all_cells_of_a_notebook_run_in_jupyterlab(page, lab):
    url, root = lab
    page.call("Page.navigate", url=f"{url}/lab/tree/notebooks/02_pruning.ipynb?token={TOKEN}")
    page.wait_for(f"{KERNEL} == 'Python 3 (ipykernel)' && {STATUS} == 'idle'", 120)
    assert page.evaluate(FIGURES) == 0

    page.click(".lm-MenuBar-item", "Run")
    page.click(".lm-Menu-item", "Run All Cells")
    page.wait_for(f"/ [1-9]?[0-9]%\\|.*\\d+\\/\\d+ /.test({BARS})", 300)
    page.picture("running")
    page.wait_for(f"{ERRORS}.length || /Idle.*Executed \\d+ cells/s.test({EXECUTED})", 1800)
    page.picture("done")
    assert page.evaluate(ERRORS) == []
    bars = page.evaluate(BARS)
    assert "100%|" in bars and "Warning" not in bars
    assert page.evaluate(FIGURES) >= 1

    page.click(".lm-MenuBar-item", "File")
    page.click(".lm-Menu-itemLabel", "Save Notebook")
    page.wait_for("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')")
    cells = nbformat.read(root / "notebooks" / "02_pruning.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
