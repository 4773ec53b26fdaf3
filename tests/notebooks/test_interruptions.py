"""Killed anywhere and started again, a study and a sweep end as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import yaml
from workspace import Workspace, rows

from sdcomp.files import replacing

SEED = 7
SMALL = {"n_images": 2, "steps": 2, "noise_images": 1}
PRUNING = SMALL | {
    "amount": 0.25, "structured": True, "mode": "remove", "recover_steps": 2, "timing_repeats": 1,
}  # fmt: skip
QUANTIZATION = SMALL | {"methods": ["max"], "n_calibration": 1, "calibration_steps": 4, "k": 2}
GRID = {
    "name": "g",
    "notebook": "01_quantization",
    "grid": {"act_bits": [6, 8]},
    "parameters": QUANTIZATION,
}


# One file


def write_for_ever(path: Path) -> None:
    while True:
        with replacing(path) as partial:
            partial.write_bytes(os.urandom(1) * 2**20)


def test_a_file_that_is_written_while_its_writers_are_killed_is_always_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    rng = random.Random(SEED)
    left = 0
    for _ in range(20):
        writers = [
            multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,)) for _ in range(2)
        ]
        for writer in writers:
            writer.start()
        time.sleep(rng.uniform(0.005, 0.03))
        for writer in writers:
            writer.kill()
            writer.join()
        left += len(list(tmp_path.glob("*.partial")))
        if path.exists():
            content = path.read_bytes()
            assert content == content[:1] * 2**20
    assert left  # they were hit in the middle of it
    with replacing(path) as partial:
        partial.write_bytes(b"at last")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"at last"


def test_what_a_live_writer_is_writing_is_not_taken_for_a_leftover(tmp_path):
    with replacing(tmp_path / "a") as first:
        first.write_bytes(b"a")
        with replacing(tmp_path / "a") as second:
            second.write_bytes(b"b")
        assert (tmp_path / "a").read_bytes() == b"b"
    assert (tmp_path / "a").read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# All of it


def kill_until_done(workspace: Workspace, command: list[str], kills: int, seconds: float) -> None:
    """Kill a command so many times, at random moments, and then let it end."""
    rng = random.Random(SEED)
    while kills:
        begin = time.monotonic()
        if workspace.run_and_kill(command, rng.uniform(0, seconds), rng):
            kills -= 1
        else:  # it ended first: all is cached by now
            seconds = time.monotonic() - begin
        workspace.check_files()
    workspace.settle()
    status, output = workspace.run(command)
    assert status == 0, output


@pytest.mark.slow
def test_a_study_that_is_killed_ten_times_ends_with_the_same_rows(tmp_path):
    def study(workspace: Workspace) -> list[str]:
        (workspace.folder / "quick.yaml").write_text(yaml.safe_dump(PRUNING))
        parameters = "-f quick.yaml -p out reports/runs/$$study --no-progress-bar"
        return workspace.make("study", "NOTEBOOKS=notebooks/02_pruning.ipynb", f"PARAMETERS={parameters}")

    undisturbed, disturbed = Workspace(tmp_path / "undisturbed"), Workspace(tmp_path / "disturbed")
    begin = time.monotonic()
    status, output = undisturbed.run(study(undisturbed))
    assert status == 0, output
    kill_until_done(disturbed, study(disturbed), kills=10, seconds=time.monotonic() - begin)

    here, there = (w.folder / "reports" / "runs" for w in (undisturbed, disturbed))
    assert rows(there / "02_pruning" / "metrics.csv") == rows(here / "02_pruning" / "metrics.csv")
    # Nothing is missing and nothing is left over, in the image cache neither.
    names = [sorted(str(p.relative_to(runs)) for p in runs.rglob("*")) for runs in (here, there)]
    assert names[0] == names[1]
    # The notebook as far as it came is overwritten.
    cells = json.loads((there / "02_pruning" / "02_pruning.ipynb").read_text())["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_ends_with_the_same_rows(tmp_path):
    pytest.importorskip("snakemake")
    undisturbed, disturbed = Workspace(tmp_path / "undisturbed"), Workspace(tmp_path / "disturbed")
    for workspace in (undisturbed, disturbed):
        (workspace.folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    command = undisturbed.make("sweep", "GRID=grid.yaml")
    begin = time.monotonic()
    status, output = undisturbed.run(command)
    assert status == 0, output
    kill_until_done(disturbed, command, kills=10, seconds=time.monotonic() - begin)
    here, there = (w.folder / "reports/runs/sweeps/g" for w in (undisturbed, disturbed))
    assert rows(there / "metrics.csv") == rows(here / "metrics.csv")
    assert len(set(rows(there / "metrics.csv"))) == len(rows(there / "metrics.csv"))
