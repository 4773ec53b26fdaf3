"""The README's snippets run as printed, and its commands in a copy of the repository."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from checkout import ROOT, checkout

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

LEFT_OUT = {
    "make test": "is itself a run of tests",
    "make lab": "does not end; test_browser.py opens JupyterLab",
    "make sweep": "installs Snakemake; test_interruptions.py sweeps",
    "PROFILE=full": "takes hours",
    "-f notebooks/profiles/": "takes long",
    "hf download": "needs the network",
    "data/weights/": "needs weights of Stable Diffusion",
    "conda ": "needs conda",
}
"""Lines with this text are not run, for this reason."""
PACKAGES = {
    "from diffusers": "diffusers",
    "load_diffusers": "diffusers",
    'format="openvino"': "openvino",
}
"""Blocks with this text need an optional package."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("copy")
    return folder, checkout(folder)


def why_not(line: str) -> str:
    return next((reason for part, reason in LEFT_OUT.items() if part in line), "")


def test_every_block_names_a_language_that_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_blocks_run_as_printed(block, capsys, monkeypatch):
    for text, package in PACKAGES.items():
        if text in block:
            pytest.importorskip(package)
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    if "images.shape" in block:
        assert capsys.readouterr().out == "torch.Size([1, 3, 64, 64]) 29.8% zero\n"


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "bash"])
def test_commands_run_as_printed(block, copy, tmp_path):
    folder, environment = copy
    lines = block.replace("<this repository>", str(folder)).splitlines()
    kept = [line for line in lines if not why_not(line)]
    if not kept:
        pytest.skip("; ".join(dict.fromkeys(map(why_not, lines))))
    command = ["bash", "-eux", "-c", "\n".join(kept)]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        status = process.wait(3600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, (tmp_path / "output").read_text()[-3000:]
