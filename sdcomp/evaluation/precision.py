"""Which precision matrix products and convolutions use, set once and recorded."""

from __future__ import annotations

import torch


def fix_precision() -> None:
    """Compute float32 products in float32: no TF32, neither in matrix products nor in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def precision_facts(device: str | torch.device) -> dict[str, object]:
    """What decides about the last bits on `device`, ready for JSON."""
    return {
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolution": torch.backends.cudnn.allow_tf32,
    }
