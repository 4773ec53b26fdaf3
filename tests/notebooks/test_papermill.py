"""The notebooks as users run them: papermill, from another folder."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
QUICK = ("-p", "n_images", "2", "-p", "steps", "2")


def papermill(folder: Path, study: str, *arguments: str) -> subprocess.CompletedProcess:
    notebook = str(NOTEBOOKS / f"{study}.ipynb")
    command = [sys.executable, "-m", "papermill", notebook, "out.ipynb", "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)


def last_cell_run(folder: Path) -> str:
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.get("execution_count")][-1].source


BAD = [
    ("00_base_model", ("-p", "device", "hpu"), "device must be a device that this machine and this PyTorch"),
    (
        "01_quantization",
        ("-y", "weight_bits: [6.5]"),
        "weight_bits must be a list of whole numbers, not of 6.5",
    ),
    ("01_quantization", ("-p", "k", "50"), "k must be at most calibration_steps, 40, not 50"),
    ("01_quantization", ("-y", "{weight_bits: [8, 6], act_bits: [8, 6, 5]}"), "not of 2 and 3"),
    ("02_pruning", ("-p", "amount", "1.3"), "such as 0.3 for 30 %, not 1.3"),
    ("02_pruning", ("-p", "amount", "abc"), "amount must be a number or a list of numbers, not 'abc'"),
    ("02_pruning", ("-p", "amount", "[0.1]"), "not '[0.1]'; pass a list with -y 'amount: [0.1]'"),
    ("02_pruning", ("-p", "ammount", "0.3"), "there is no parameter 'ammount'"),
    ("02_pruning", ("-p", "model", "nowhere"), "model must be an existing model folder"),
    ("02_pruning", ("-p", "mode", "remove"), "set structured to true as well"),
    ("03_profiling", ("-p", "repeats", "0"), "repeats must be between 1 and 10,000, not 0"),
    ("03_profiling", ("-y", "amounts: [1.5]"), "amounts must be a fraction from 0 to below 1"),
    ("02_pruning", ("-y", "variants: [removed 2]"), "variants must be pruned variants, such as"),
    ("02_pruning", ("-p", "dtype", "float16", "-p", "recover_steps", "9"), "recovery trains in float32"),
    ("04_combined", ("-y", "{dtype: float16, variants: [2:4 recovered 9]}"), "recovery trains in float32"),
    ("05_claims", ("-p", "seed", "1"), "there is no parameter 'seed'"),
    ("06_low_bits", ("-p", "k", "30"), "k must be at most steps, 20, not 30"),
    ("07_conditions", ("-y", "conditions: [10]"), "conditions must be a list of texts, not of 10"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("study", "arguments", "sentence"), BAD, ids=[f"{s}-{a[1]}" for s, a, _ in BAD])
def test_wrong_parameter_stops_the_run_with_one_sentence(tmp_path, study, arguments, sentence):
    result = papermill(tmp_path, study, *arguments)
    assert result.returncode != 0
    shown = result.stderr.split("ParameterError")[-1]
    assert sentence in shown and "Traceback" not in shown
    assert f'Run("{study}", globals())' in last_cell_run(tmp_path)


@pytest.mark.slow
def test_a_filter_that_is_no_layers_stops_the_run_when_the_model_is_loaded(tmp_path):
    result = papermill(tmp_path, "01_quantization", "-y", "quant_filters: [nope]")
    assert result.returncode != 0
    assert "UserError: filter 'nope' matches no layer" in result.stderr
    # Before any image.
    assert "sdcomp.load(" in last_cell_run(tmp_path)


@pytest.mark.slow
def test_good_parameters_write_results_into_the_folder_asked_for(tmp_path):
    result = papermill(tmp_path, "02_pruning", "-y", "amount: [0.1, 0.3]", *QUICK, "-p", "out", "results")
    assert result.returncode == 0, result.stderr
    assert "unknown parameter" not in result.stderr
    with open(tmp_path / "results" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "unstructured"]
    zeros = [float(row["value"]) for row in rows if row["metric"] == "zero-valued share"]
    assert zeros == pytest.approx([10, 30], rel=0.02)
    assert [row["n"] for row in rows if row["metric"] == "PSNR"] == ["2", "2"]
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"metrics.csv", "run.json", "quality.png", "images.png"} <= written


OPENVINO = [
    (
        "03_profiling",
        "{backends: [openvino], amounts: [0.25]}",
        ("-p", "repeats", "1"),
        "removed",
        "UNet step",
    ),
    (
        "04_combined",
        "{backends: [simulated, openvino], packed_bits: [4], budgets: [0.5]}",
        ("-p", "k", "2"),
        "unstructured",
        "UNet file",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("study", "wanted", "more", "pruning", "metric"), OPENVINO)
def test_openvino_is_one_more_execution(tmp_path, study, wanted, more, pruning, metric):
    pytest.importorskip("openvino")
    few = ("-p", "calibration_steps", "2", "-p", "n_calibration", "1", "-p", "out", "results")
    result = papermill(tmp_path, study, "-y", wanted, *few, *more, *QUICK)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "results" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    method = f"{pruning} + timestep_mse + openvino"
    assert {metric, "time relative to fp32"} <= {row["metric"] for row in rows if row["method"] == method}
