"""The devices of this machine: whether PyTorch can compute on one, and its name."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

from sdcomp.errors import UserError


def check_device(device: object) -> torch.device:
    """Return the device of a name such as "cpu", "cuda" or "cuda:1".

    Raises UserError for a device that this machine or this PyTorch does not have, and for anything that is
    not a device's name.
    """
    if not isinstance(device, str | torch.device):
        raise UserError(f"device must be a name such as 'cpu' or 'cuda', not {device!r}")
    try:
        found = torch.device(device)
        # The only test that works for all devices; it takes no memory.
        torch.empty(0, device=found)
    except Exception as error:  # each device raises its own kind of error
        lines = str(error).strip().splitlines()
        reason = lines[0][:200].rstrip(".") if lines else type(error).__name__
        raise UserError(
            f"device {str(device)!r} cannot be used here ({reason}); "
            "give 'cpu', or install the PyTorch that is built for this device"
        ) from None
    return found


@functools.cache
def computes_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this CPU.

    Elsewhere, for example without AVX-512, a product takes tens to thousands of times as long as in float32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def device_name(device: torch.device | str) -> str:
    """The name of a GPU, or of the CPU with its number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
