"""An image is the same, bit for bit, wherever its prompt stands, on whatever machine this is.

One machine stands in for others: the libraries' own variables choose older instruction sets and other
kernels. Each setting runs in its own process (`bits.py`), since libraries read them when they are loaded.
"""

import json
import os
import subprocess
import sys

import pytest

from sdcomp.files import ROOT

SETTINGS = {
    "default": {},
    "MKL, any Intel or AMD": {"MKL_CBWR": "COMPATIBLE"},
    "MKL, reproducible AVX2": {"MKL_CBWR": "AVX2"},
    "MKL, AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "oneDNN, AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "PyTorch, AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "PyTorch, no vectors": {"ATEN_CPU_CAPABILITY": "default"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_image_is_the_same_wherever_its_prompt_stands_on_any_instruction_set(setting):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "bits.py"), "1", "2"],
        env={**os.environ, **SETTINGS[setting], "PYTHONPATH": path},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) >= 72
    assert {case: d for case, d in differences.items() if d != 0} == {}
