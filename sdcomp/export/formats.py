"""One function that writes a model in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sdcomp.export.checkpoint import save_checkpoint
from sdcomp.export.diffusers_pipeline import save_diffusers
from sdcomp.export.onnx import save_onnx
from sdcomp.export.openvino import save_openvino
from sdcomp.model import StableDiffusion
from sdcomp.model.kinds import require_model

FORMATS: dict[str, Callable[..., Path]] = {
    "checkpoint": save_checkpoint,
    "diffusers": save_diffusers,
    "openvino": save_openvino,
    "onnx": save_onnx,
}
"""Writers by the name of their format, each called as `writer(sd, path, dtype)`."""


def export(sd: StableDiffusion, path: str | Path, format: str, dtype: torch.dtype | None = None) -> Path:
    """Write a model for other tools; return the path. The UNet may be quantized, packed or pruned.

    - "checkpoint": plain weights, rounded ones baked in. A path that ends in `.safetensors` gets the original
      layout, for ComfyUI and diffusers; any other path gets a folder of diffusers.
    - "diffusers": a folder of diffusers, also of a UNet that lost channels; see `load_diffusers`.
    - "openvino": the UNet for OpenVINO, `path` ends in `.xml`; int8 weights, and calibrated scales in the
      graph. See `load_openvino`.
    - "onnx": the same for ONNX Runtime and other engines, `path` ends in `.onnx`.

    `dtype` converts plain weights. Raises ValueError for another format, ModelError for a UNet that the
    format cannot hold, UserError for a file that cannot be written, TypeError for a `dtype` that `load` does
    not take and for a UNet alone.
    """
    require_model(sd)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    return FORMATS[format](sd, Path(path).expanduser(), dtype)
