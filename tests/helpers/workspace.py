"""A copy of the repository, for tests that run it, kill it and check the files that remain."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
from checkout import checkout
from safetensors.torch import load_file


class Workspace:
    """The copy: its own image cache, one thread, and the interpreter that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = checkout(folder) | {"OMP_NUM_THREADS": "1"}
        self.spared: list[psutil.Process] = []
        # pip would change the environment that the tests run in.
        python = folder / "python"
        python.write_text('#!/bin/sh\n[ "$2" = pip ] || exec .venv/bin/python "$@"\n')
        python.chmod(0o755)

    def make(self, *arguments: str) -> list[str]:
        """The command `make ...` in the copy."""
        return ["make", "PY=./python", *arguments]

    def start(self, command: list[str]) -> subprocess.Popen:
        """Start a command in a session of its own, its output in the file `output`."""
        with open(self.folder / "output", "w") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(self, command: list[str], timeout: float = 1800) -> tuple[int, str]:
        """Run a command to its end: its exit status and what it printed."""
        process = self.start(command)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return status, (self.folder / "output").read_text()

    def run_and_kill(self, command: list[str], seconds: float, rng: random.Random) -> bool:
        """Kill a command after some seconds; return False if it had ended before, successfully.

        Kills at random all its processes, as a power cut does; or its process group, which Jupyter's
        kernels are not in; or one of its processes, so that the others must handle its end.
        """
        process = self.start(command)
        with suppress(subprocess.TimeoutExpired):
            assert process.wait(seconds) == 0, (self.folder / "output").read_text()
            return False
        with suppress(psutil.NoSuchProcess):
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            self.spared += family
            how = rng.choice(["all", "group", "one"])
            if how == "group":
                os.killpg(process.pid, signal.SIGKILL)
            for victim in {"all": family, "group": [], "one": [rng.choice(family)]}[how]:
                victim.kill()
        process.wait(1800)
        return True

    def settle(self) -> None:
        """Wait for the processes that survived a kill."""
        assert not psutil.wait_procs(self.spared, timeout=600)[1]

    def check_files(self) -> None:
        """Check that every file of ours is whole."""
        for path in (self.folder / "reports" / "runs").rglob("*"):
            if path.is_dir() or path.parent.suffix == ".partial":
                continue
            with suppress(FileNotFoundError):  # a surviving process has just replaced it
                if path.suffix == ".safetensors":
                    assert load_file(path)
                elif path.name == "run.json":
                    assert json.loads(path.read_text())["run_id"]
                elif path.suffix == ".png":
                    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def rows(path: Path) -> list[tuple[str, ...]]:
    """The rows of a `metrics.csv`, in order; rows of measured times without their values."""
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert found
    for row in found:
        assert None not in row and None not in row.values(), "a row is cut off"
        if "time" in row["metric"].split() or row["unit"] in ("s", "x", "images/s"):
            row.update(value="", ci_low="", ci_high="")
    return [tuple(row.values()) for row in found]
