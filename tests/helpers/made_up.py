"""A notebook with every kind of parameter, and rules of the real notebooks for them."""

import pytest
from papermill.translators import PythonTranslator

from sdcomp.study import read_parameters
from sdcomp.study.parameter_rules import STUDIES, common

PARAMETERS = """\
model: str = "data/tiny"  # model folder
amount: "float or list[float]" = 0.3  # share, or a list of shares
bits: "int or list[int]" = 8  # 2 to 8
quant_filters: list[str] = ["time_embed", "out"]  # layers left out
guidance_sweep: list[float] = []  # empty: no sweep
remove_amounts: list[float] = [0.25]  # further amounts
structured: bool = False
mode: str = "mask"
seed: int = 0
n_images: int = 32
steps: int = 20
sampler: str = "ddim"
guidance_scale: "float or str" = ""
dtype: str = "float32"
batch_size: int = 0
device: str = "cpu"
out: str = ""
"""

STUDY = "07_made_up"
RECORD = f"run = Run({STUDY!r}, globals())"

DEFAULTS = {
    "model": "data/tiny", "amount": 0.3, "bits": 8, "quant_filters": ["time_embed", "out"],
    "guidance_sweep": [], "remove_amounts": [0.25], "structured": False, "mode": "mask", "seed": 0,
    "n_images": 32, "steps": 20, "sampler": "ddim", "guidance_scale": "", "dtype": "float32",
    "batch_size": 0, "device": "cpu", "out": "",
}  # fmt: skip


def _removal_is_structured(p: dict) -> str | None:
    return "mode='remove' needs structured" if p["mode"] == "remove" and not p["structured"] else None


@pytest.fixture(autouse=True)
def made_up_study(monkeypatch):
    """Register rules for `STUDY`, and for another study with the same parameters."""
    rules = {
        **common.COMMON,
        **common.GENERATION,
        "amount": common.AMOUNT,
        "bits": common.BITS,
        "quant_filters": STUDIES["01_quantization"].rules["quant_filters"],
        "guidance_sweep": common.between(0, 100),
        "remove_amounts": common.AMOUNTS,
        "structured": common.FREE,
        "mode": common.one_of("mask", "remove"),
    }
    for name in (STUDY, "08_another"):
        monkeypatch.setitem(STUDIES, name, common.Study(rules, _removal_is_structured))


def read(namespace: dict) -> dict:
    return read_parameters(namespace, STUDY)


def notebook(injected: dict | None = None, parameters: str = PARAMETERS) -> dict:
    """The globals of a notebook when its third cell runs, after the parameters and the injected ones."""
    cells = ["", parameters]
    if injected is not None:
        cells.append(PythonTranslator.codify(injected))
    namespace: dict = {}
    for cell in cells:
        exec(cell, namespace)
    return {**namespace, "In": [*cells, RECORD]}
