"""The peak of a call's memory."""

import subprocess
import sys

import pytest
import torch

from sdcomp.evaluation import peak_memory


def test_the_peak_counts_only_the_call():
    # In a fresh process: this one may free or reuse memory of other tests during the call.
    code = (
        "import torch; from sdcomp.evaluation import peak_memory\n"
        "print(peak_memory(lambda: torch.ones(2**24)), peak_memory(lambda: None))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ones, nothing = found.stdout.split()
    if ones == "None":
        pytest.skip("this system does not tell how much memory a process had")
    assert 0.9 * 2**26 < int(ones) < 1.5 * 2**26
    assert int(nothing) < 2**24


def test_a_failed_call_is_not_repeated():
    calls = []

    def call() -> None:
        calls.append(1)
        raise FileNotFoundError("no such image")

    for device in ("cpu", "meta"):
        with pytest.raises(FileNotFoundError):
            peak_memory(call, device)
    assert len(calls) == 2 and peak_memory(lambda: None, "meta") is None


@pytest.mark.cuda
def test_the_peak_on_a_device_is_counted_by_its_allocator():
    found = peak_memory(lambda: torch.ones(2**24, device="cuda"), "cuda")
    assert found == 2**26
