"""Notebooks on a bad day: variants that fail, a machine without integer int8_kernels."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from notebook_parameters import NOTEBOOKS, namespace
from torch import nn

from sdcomp.errors import UserError
from sdcomp.integer import int8_kernels
from sdcomp.study import Builder, Run, Variant
from sdcomp.study.results import read_rows

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
        if "Builder" in found and "from sdcomp.study import" in cell.source:
            found["Builder"] = breaking(broken)
    return found


def breaking(amounts: list[float]) -> type[Builder]:
    class Broken(Builder):
        def pruned(self, variant: Variant) -> nn.Module:
            unet = super().pruned(variant)
            if variant.amount in amounts:
                with torch.no_grad():
                    unet.out[2].bias.fill_(float("nan"))
            return unet

    return Broken


def amounts(rows: list[dict]) -> list[float]:
    return [row["variant"].amount for row in rows]


def rows(folder: Path, *metrics: str) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.csv") if row["metric"] in metrics]


@pytest.mark.parametrize("broken", [[0.4], [0.2, 0.4]], ids=["one fails", "all fail"])
def test_a_pruned_variant_that_fails(tmp_path, broken):
    found = run_with(tmp_path, "02_pruning", broken, amount=[0.2, 0.4], variants=[], **JUDGED)
    failed = rows(tmp_path, "failed")
    assert amounts(failed) == broken
    assert all("step 1 of 2" in row["unit"] for row in failed)
    assert set(amounts(rows(tmp_path, "PSNR", "time saved", "noise MSE"))) == {0.2} - set(broken)
    table = found["run"].table("PSNR")
    assert table["failed"].astype(bool).sum() == len(broken)
    assert {"quality.png", "gains.png", "images.png", "run.json"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_a_combined_variant_that_fails(tmp_path):
    few = {"n_calibration": 1, "calibration_steps": 10, **JUDGED}
    settings = {"amount": [0.2, 0.4], "backends": [], "variants": [], **few}
    settings["save_to"] = str(tmp_path / "model")
    found = run_with(tmp_path, "04_combined", [0.4], **settings)
    assert amounts(rows(tmp_path, "failed")) == [0.4]
    assert found["same"] and len(found["images"]) == 1 and len(found["points"]) == 2
    with pytest.raises(UserError, match="every variant failed"):
        run_with(tmp_path / "all", "04_combined", [0.2, 0.4], **settings)
    assert amounts(rows(tmp_path / "all", "failed")) == [0.2, 0.4]


def test_int8_without_kernels_is_named_so_in_rows_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_kernels, "missing", lambda _: "this machine has no integer kernels")
    few = {"n_calibration": 1, "calibration_steps": 5, "repeats": 1, "amounts": [0.25], "backends": ["int8"]}
    found = run_with(tmp_path, "03_profiling", [], **few)
    labels = [f"{pruning}timestep_mse k5 W8A8 int8 (dequantized)" for pruning in ("", "removed 25 %, ")]
    names = ["int8 (dequantized)", "removed 25\u00a0%, int8 (dequantized)"]
    assert list(found["times"].index) == ["fp32", *names]
    assert [row["label"] for row in rows(tmp_path, "time relative to fp32")] == labels
    assert found["run"].facts["int8 execution"] == "dequantized"
