"""What decides the last bits of a computation: the machine, its libraries, and how they round."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def fix_precision() -> None:
    """Compute float32 products and convolutions in float32 on GPUs too, for this whole process.

    PyTorch's default rounds the inputs of convolutions to TF32, 10 bits of mantissa, and those of matrix
    products not, so two variants would differ by more than their compression.
    """
    # The older switches: after the newer ones, `fp32_precision`, packages that read the older ones fail.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def precision_facts(device: torch.device | str = "cpu") -> dict[str, object]:
    """What the bits of a result depend on besides weights and settings, ready for JSON."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution": torch.backends.cudnn.conv.fp32_precision == "tf32",
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""They choose the instruction sets of the CPU's libraries."""


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
