"""`make sweep`: what a wrong grid says, what a failed point leaves, what runs again and what does not."""

from __future__ import annotations

import pytest
import yaml
from workspace import Workspace

pytest.importorskip("snakemake")
pytestmark = pytest.mark.slow

GOOD = {
    "name": "g",
    "notebook": "02_pruning",
    "grid": {"amount": [0.1, 0.2]},
    "parameters": {"n_images": 2, "steps": 2, "noise_images": 1, "timing_repeats": 1},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("sweep") / "repository")


def sweep(workspace: Workspace, grid: object) -> tuple[int, str]:
    (workspace.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return workspace.run(workspace.make("sweep", "GRID=grid.yaml"))


def dry_run(workspace: Workspace, grid: object, *options: str) -> str:
    (workspace.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = ["./python", "-m", "snakemake", "-s", "notebooks/sweeps/Snakefile", "--configfile", "grid.yaml"]
    status, output = workspace.run([*command, "--dry-run", "--printshellcmds", *options])
    assert status == 0, output
    return output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"grid": {"ammount": [0.1]}},
            "there is no parameter 'ammount' to sweep; 02_pruning has model, amount,",
        ),
        ({"parameters": {"n_image": 2}}, "there is no parameter 'n_image' to sweep; 02_pruning has"),
        ({"parameters": {"out": "x"}}, "there is no parameter 'out' to sweep"),
        ({"notebook": "02_prunning"}, "there is no notebook '02_prunning'; there are 00_base_model,"),
        ({"notebook": None}, "the grid's 'notebook' is missing or wrong"),
        ({"grid": {"amount": 0.1}}, "the grid's 'amount' must be a list of values, not 0.1"),
        ({"grid": {"amount": []}}, "the grid's 'amount' must be a list of values, not []"),
        ({"grid": {"amount": [0.1, 0.2, 0.1]}}, "the grid has no points, or two that are alike"),
        ({"grid": {}}, "the grid has no points, or two that are alike"),
        (
            {"gird": {"amount": [0.1]}},
            "a grid has no 'gird'; it has name, notebook, grid, parameters, threads",
        ),
    ],
)
def test_a_wrong_grid_is_one_sentence_before_anything_runs(workspace, change, sentence):
    status, output = sweep(workspace, GOOD | change)
    assert status != 0 and "Traceback" not in output and "Error in" not in output
    assert [line for line in output.splitlines() if line.startswith(sentence)]
    assert not (workspace.folder / "reports" / "runs").exists()


@pytest.mark.parametrize("path", ["GRID=nowhere.yaml", "GRID="])
def test_a_grid_that_is_not_there_is_one_sentence(workspace, path):
    status, output = workspace.run(workspace.make("sweep", path))
    assert status != 0 and "Traceback" not in output and "usage" not in output
    assert "is not a file; give one such as GRID=notebooks/sweeps/pruning.yaml" in output


@pytest.mark.parametrize("threads", [{}, {"threads": 3}])
def test_the_number_of_threads_is_the_grids_and_not_the_machines(workspace, threads):
    for cores in ("1", "2", "8"):
        output = dry_run(workspace, GOOD | threads, "--cores", cores)
        assert output.count("OMP_NUM_THREADS=") == 2
        assert output.count(f"OMP_NUM_THREADS={threads.get('threads', 1)} ") == 2


def test_a_point_that_fails_says_why_and_the_others_are_kept(workspace):
    folder = workspace.folder / "reports" / "runs" / "sweeps" / "g"
    status, output = sweep(workspace, GOOD | {"grid": {"amount": [0.1, 1.3]}})
    assert status != 0 and "Traceback" not in output
    sentence = "amount must be a fraction from 0 to below 1, such as 0.3 for 30 %, not 1.3"
    assert f"amount=1.3: ParameterError: {sentence}" in output.splitlines()
    assert not (folder / "metrics.csv").exists() and not (folder / "amount=1.3" / "metrics.csv").exists()
    assert sentence in (folder / "amount=1.3" / "02_pruning.ipynb").read_text()

    first = folder / "amount=0.1" / "metrics.csv"
    before = first.stat().st_mtime_ns
    status, output = sweep(workspace, GOOD)
    assert status == 0, output
    assert first.stat().st_mtime_ns == before
    head, *rows = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    for amount in (0.1, 0.2):
        own_head, *own = (folder / f"amount={amount}" / "metrics.csv").read_text().splitlines(keepends=True)
        assert own_head == head and own == rows[: len(own)]
        rows = rows[len(own) :]
    assert not rows

    # With nothing to do, nothing is done; other parameters are other points' results.
    assert "Nothing to be done" in sweep(workspace, GOOD)[1]
    output = dry_run(workspace, GOOD | {"parameters": {"n_images": 3}}, "--cores", "1")
    assert output.count("Params have changed") == output.count("rule point:") == 2
