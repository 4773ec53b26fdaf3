"""The quality that notebooks assert: a wrong scale stops them."""

from __future__ import annotations

import matplotlib
import nbformat
import pytest
from notebook_parameters import NOTEBOOKS, namespace

from sdcomp.study import Builder, Run, Variant

QUICK = {"n_images": 2, "steps": 4, "device": "cpu", "noise_images": 1, "n_calibration": 1}
SETTINGS = {
    "04_combined": {"calibration_steps": 10, "timing_repeats": 1, "variants": [], "fewer_steps": []},
}
pytestmark = pytest.mark.slow


class WrongScale(Builder):
    def calibrated(self, variant: Variant):
        model = super().calibrated(variant)
        for layer in model.quantized_layers():
            layer.weight_scale = 0.2 * layer.weight_scale  # most weights are clipped
            layer.clear_cache()
        return model


def checked(folder, study: str, builder: type[Builder]) -> None:
    """Run a notebook's cells up to the one that asserts quality."""
    matplotlib.use("agg")
    settings = {**QUICK, **SETTINGS[study], "out": str(folder)}
    found = namespace(study, **settings)
    found |= {"run": Run(study, found), "display": lambda *_: None}
    cells = [c for c in nbformat.read(NOTEBOOKS[study], as_version=4).cells if c.cell_type == "code"][2:]
    for cell in cells:
        exec(cell.source, found)
        if "Builder" in found and "from sdcomp.study import" in cell.source:
            found["Builder"] = builder
        if cell.source.startswith("# This must hold on every machine"):
            return
    raise ValueError(f"{study} asserts no quality")


@pytest.mark.parametrize("study", SETTINGS)
def test_a_wrong_scale_stops_a_notebook(tmp_path, study):
    checked(tmp_path / "right", study, Builder)
    with pytest.raises(AssertionError, match="less than 20 dB to fp32"):
        checked(tmp_path / "wrong", study, WrongScale)
