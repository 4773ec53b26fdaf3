"""How a quantized model runs on a device: in integers, or on weights that are dequantized layer by layer."""

from __future__ import annotations

import torch

from sdcomp.errors import UserError
from sdcomp.integer import int8_kernels

EXECUTIONS = ("auto", "kernels", "dequantized")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types in which a model may compute everything that is not quantized."""
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def check_dtype(dtype: object) -> torch.dtype:
    """Return the type. Raises ValueError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, not {dtype!r}")
    return dtype


def choose_execution(
    device: torch.device | str, dtype: torch.dtype, wanted: str = "auto", weight_max: int = 127
) -> str:
    """Choose "kernels" or "dequantized" for an int8 model on `device` that computes in `dtype`.

    `weight_max`: the largest magnitude of the model's integer weights.

    "kernels": oneDNN multiplies integers; saves memory and time; needs a CPU, float32 or bfloat16. On a CPU
    without VNNI no weight may have more than 7 bits.
    "dequantized": each layer turns its int8 weight into `dtype` when it runs; saves memory, no time; runs
    on every device. "auto" takes the kernels where they are available.

    Raises ValueError for another name or type, UserError for "kernels" where they are not available.
    """
    if wanted not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, not {wanted!r}")
    check_dtype(dtype)
    if wanted == "dequantized":
        return wanted
    reason = why_no_kernels(torch.device(device), dtype, weight_max)
    if reason is None:
        return "kernels"
    if wanted == "kernels":
        raise UserError(f"{reason}; execution='dequantized' runs on any device, saving memory but no time")
    return "dequantized"


def why_no_kernels(device: torch.device, dtype: torch.dtype, weight_max: int) -> str | None:
    """Return the reason why the int8 kernels are not available there, or None if they are."""
    if device.type != "cpu":
        return f"the int8 kernels run on CPUs only, not on {device}"
    if dtype not in _KERNEL_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the int8 kernels compute in float32 or bfloat16, not in {name}"
    return int8_kernels.missing(weight_max)
