"""Everything that changes the last bits of a result: the machine, its libraries, and their rounding."""

from __future__ import annotations

import os
from typing import Any

import torch

from sdcomp.model.device import device_name


def fix_precision() -> None:
    """Make this process compute float32 products and convolutions in float32, on GPUs and CPUs.

    On a GPU, PyTorch rounds the inputs of convolutions to TF32 (10 bits of mantissa) by default, but not
    those of matrix products; two variants would then differ by more than their compression. On a CPU,
    `torch.set_float32_matmul_precision("medium")` would round inputs to bfloat16.
    """
    # First reset the newer switches: if one is set, the older ones raise errors or have no effect.
    for backend in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn.conv):
        backend.fp32_precision = "none"
    # Then set the older switches: other packages read them, which fails if a newer one is set.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def precision_facts(device: torch.device | str = "cpu") -> dict[str, object]:
    """Everything besides weights and settings that a result's bits depend on, ready for JSON."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": {
            "matmul": _rounds(torch.backends.cuda.matmul),
            "convolution": _rounds(torch.backends.cudnn.conv),
        },
        "cpu_rounds_float32": {
            "matmul": _rounds(torch.backends.mkldnn.matmul),
            "convolution": _rounds(torch.backends.mkldnn.conv),
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


_VARIABLES = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip
"""Environment variables that choose instruction sets or rounding in the libraries under PyTorch."""


def _rounds(operator: Any) -> bool:
    """Whether this kind of operator of `torch.backends` rounds float32 inputs to a narrower type."""
    return operator.fp32_precision in ("tf32", "bf16")
