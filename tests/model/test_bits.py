"""On every instruction set, an image has the same bits wherever its prompt stands in the batch.

One machine plays many: environment variables make the libraries choose older instruction sets and other
kernels. Each setting runs in its own process (`bits.py`), because libraries read them when they are loaded.
"""

import json
import os
import subprocess
import sys

import pytest
from bits import BATCHES

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
def test_an_image_does_not_depend_on_its_place_in_the_batch(setting):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "bits.py"), "1", "2"],
        # Threads that wait without spinning cost no time on a busy machine.
        env={**os.environ, **SETTINGS[setting], "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    # Each batch size, with and without guidance, with one and two threads; at least 4 cases.
    assert len(differences) >= 4 * len(BATCHES) * 2 * 2
    assert {case: d for case, d in differences.items() if d != 0} == {}
