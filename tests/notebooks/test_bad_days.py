"""Notebooks on a bad day: variants that fail, a machine without integer kernels."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from notebook_parameters import NOTEBOOKS, namespace
from torch import nn

from sdcomp.errors import UserError
from sdcomp.quantization import QuantModel
from sdcomp.study import Run

QUICK = {"n_images": 2, "steps": 2, "device": "cpu"}
JUDGED = {"noise_images": 1, "timing_repeats": 1}
pytestmark = pytest.mark.slow


def run_with(folder: Path, study: str, broken: list[float], **injected: object) -> dict:
    """The globals of a notebook after a run in which pruning by some amounts gives NaN."""
    matplotlib.use("agg")
    found = namespace(study, **QUICK, **injected, out=str(folder))
    notebook = nbformat.read(NOTEBOOKS[study], as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][2:]
    found["run"] = Run(study, found)
    found["display"] = lambda *_: None
    for cell in cells:
        exec(cell.source, found)
        if "pruned" in found and "from sdcomp.study import" in cell.source:
            found["pruned"] = breaking(found["pruned"], broken)
    return found


def breaking(pruned, amounts: list[float]):
    def made(run, sd, kind, amount, *args, **options) -> nn.Module:
        unet = pruned(run, sd, kind, amount, *args, **options)
        if amount in amounts:
            with torch.no_grad():
                unet.out[2].bias.fill_(float("nan"))
        return unet

    return made


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("broken", [[0.4], [0.2, 0.4]], ids=["one fails", "all fail"])
def test_a_pruned_variant_that_fails(tmp_path, broken):
    found = run_with(tmp_path, "02_pruning", broken, amount=[0.2, 0.4], **JUDGED)
    failed = [row for row in rows(tmp_path) if row["metric"] == "failed"]
    assert [row["parameters"] for row in failed] == [f'{{"amount": {amount}}}' for amount in broken]
    assert all("step 1 of 2" in row["unit"] for row in failed)
    others = {
        row["parameters"] for row in rows(tmp_path) if row["metric"] in ("PSNR", "time saved", "noise MSE")
    }
    assert others == {'{"amount": 0.2}'} - {row["parameters"] for row in failed}
    table = found["run"].table("PSNR")
    assert table["failed"].astype(bool).sum() == len(broken)
    assert {"quality.png", "gains.png", "images.png", "run.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_combined_variant_that_fails(tmp_path):
    few = {"n_calibration": 1, "calibration_steps": 10, "order_ablation": False, **JUDGED}
    settings = {"amount": [0.2, 0.4], "backends": ["fp32"], "remove_amounts": [], **few}
    settings["save_to"] = str(tmp_path / "model")
    found = run_with(tmp_path, "04_combined", [0.4], **settings)
    assert [row["parameters"] for row in rows(tmp_path) if row["metric"] == "failed"] == ['{"amount": 0.4}']
    assert found["same"] and len(found["images"]) == 1 and len(found["points"][found["points"]["own"]]) == 2
    with pytest.raises(UserError, match="every variant failed"):
        run_with(tmp_path / "all", "04_combined", [0.2, 0.4], **settings)
    assert len([row for row in rows(tmp_path / "all") if row["metric"] == "failed"]) == 2


def test_int8_without_kernels_is_named_so_in_rows_and_figures(tmp_path, monkeypatch):
    def dequantized(self):
        self.execution = "dequantized"
        return self

    monkeypatch.setattr(QuantModel, "to_int8", dequantized)
    few = {"n_calibration": 1, "calibration_steps": 5, "repeats": 1, "amounts": [0.25], "backends": ["int8"]}
    found = run_with(tmp_path, "03_profiling", [], **few)
    assert list(found["times"].index) == [
        "fp32",
        "int8 (dequantized)",
        "removed + int8 (dequantized) 25 %",
    ]
    assert {row["method"] for row in rows(tmp_path) if row["metric"] == "time relative to fp32"} == {
        "int8 (dequantized)",
        "removed + int8 (dequantized)",
    }
    assert found["run"].facts["int8 execution"] == "dequantized"
