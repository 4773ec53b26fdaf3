"""The README's commands and snippets, run as printed in a copy of the repository."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from checkout import ROOT, checkout

LANGUAGES = {"bash": ["bash", "-eux", "-c"], "python": [sys.executable, "-c"]}
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
"""Why a line that has this in it is not run."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("copy")
    return folder, checkout(folder)


def why_not(line: str) -> str:
    return next((reason for part, reason in LEFT_OUT.items() if part in line), "")


def test_every_block_names_a_language_that_is_run():
    assert {language for language, _ in BLOCKS} == set(LANGUAGES)


@pytest.mark.slow
@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=lambda text: text.split("\n")[0])
def test_block_runs_as_printed(language, block, copy, tmp_path):
    folder, environment = copy
    lines = block.replace("<this repository>", str(folder)).splitlines()
    kept = [line for line in lines if language == "python" or not why_not(line)]
    if not kept:
        pytest.skip("; ".join(dict.fromkeys(map(why_not, lines))))
    command = [*LANGUAGES[language], "\n".join(kept)]
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
