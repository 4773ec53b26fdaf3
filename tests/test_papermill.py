"""The notebooks as users run them: papermill, from another folder."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "02_pruning.ipynb"
QUICK = ("-p", "n_images", "2", "-p", "steps", "2")


def papermill(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), "out.ipynb", "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("-p", "amount", "1.3"),
            "amount must be a fraction from 0 to below 1, such as 0.3 for 30 %, not 1.3",
        ),
        (("-p", "amount", "abc"), "amount must be a number or a list, not 'abc'"),
        (("-p", "amount", "[0.1]"), "amount must be a number or a list, not '[0.1]'; pass a list with -y"),
        (("-p", "ammount", "0.3"), "there is no parameter 'ammount'"),
        (("-p", "model", "nowhere"), "model must be an existing model folder"),
    ],
)
def test_wrong_parameter_stops_the_run_with_one_sentence(tmp_path, arguments, sentence):
    result = papermill(tmp_path, *arguments)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr.split("ParameterError")[-1]


@pytest.mark.slow
def test_good_parameters_write_results_into_the_folder_asked_for(tmp_path):
    result = papermill(tmp_path, "-y", "amount: [0.1, 0.3]", *QUICK, "-p", "out", "results")
    assert result.returncode == 0, result.stderr
    assert "unknown parameter" not in result.stderr
    with open(tmp_path / "results" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "unstructured"]
    zeros = [float(row["value"]) for row in rows if row["metric"] == "zero-valued share"]
    assert zeros == pytest.approx([10, 30], rel=0.02)
    assert [row["n"] for row in rows if row["metric"] == "PSNR"] == ["2", "2"]
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"metrics.csv", "run.json", "quality.png", "images.png"} <= written
