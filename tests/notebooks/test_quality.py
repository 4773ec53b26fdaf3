"""The quality that notebooks assert: a wrong scale stops them."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import nbformat
import pytest
from notebook_parameters import NOTEBOOKS, namespace

from sdcomp.quantization import QuantModel
from sdcomp.study import Builder, Run, Variant

QUICK = {"n_images": 2, "steps": 4, "device": "cpu"}
SETTINGS = {
    "01_quantization": {
        "calibration_steps": 10, "noise_images": 1, "methods": ["weights_only"], "n_calibration": 1,
    },
    "04_combined": {
        "calibration_steps": 10, "noise_images": 1, "timing_repeats": 1, "variants": [], "n_calibration": 1,
    },
    "06_low_bits": {"ladder": ["low_bits"], "act_bits": [32, 8], "norms": [], "n_calibration": 1},
    "07_conditions": {
        "bits": [8], "draws": 1, "policies": [], "calibration_samplers": [], "conditions": [],
        "calibration_sizes": [1],
    },
}  # fmt: skip
pytestmark = pytest.mark.slow


class WrongScale(Builder):
    """Weights are rounded on a grid of a fifth of their range, so most of them are clipped."""

    def calibrated(self, variant: Variant) -> QuantModel:
        model = super().calibrated(variant)
        for layer in model.quantized_layers():
            layer.weight_scale = 0.2 * layer.weight_scale
            layer.clear_cache()
        return model


def run_until_checked(folder: Path, study: str, builder: type[Builder]) -> None:
    """Run a notebook's cells up to the one that asserts quality."""
    matplotlib.use("agg")
    found = namespace(study, **QUICK, **SETTINGS[study], out=str(folder))
    found |= {"run": Run(study, found), "display": lambda *_: None}
    cells = [c for c in nbformat.read(NOTEBOOKS[study], as_version=4).cells if c.cell_type == "code"][2:]
    for cell in cells:
        exec(cell.source, found)
        if "check_close(" in cell.source:
            return
        if "Builder" in found:
            found["Builder"] = builder
    raise ValueError(f"{study} asserts no quality")


@pytest.mark.parametrize("study", SETTINGS)
def test_a_wrong_scale_stops_a_notebook(tmp_path, study):
    run_until_checked(tmp_path / "right", study, Builder)
    with pytest.raises(AssertionError, match="not close to the images of fp32"):
        run_until_checked(tmp_path / "wrong", study, WrongScale)
