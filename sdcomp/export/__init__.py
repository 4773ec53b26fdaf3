"""Models in other tools: plain checkpoints, diffusers, OpenVINO, ONNX.

`sdcomp.export(sd, path, format=...)` writes a model; the loaders of what it wrote are beside it.
"""

import sys
from types import ModuleType

from sdcomp.export.diffusers_pipeline import load_diffusers
from sdcomp.export.diffusers_unet import as_diffusers_unet, from_diffusers_unet
from sdcomp.export.formats import FORMATS, export
from sdcomp.export.openvino import OpenVINOUNet, load_openvino

__all__ = [
    "FORMATS",
    "OpenVINOUNet",
    "as_diffusers_unet",
    "export",
    "from_diffusers_unet",
    "load_diffusers",
    "load_openvino",
]


class _CallableRoom(ModuleType):
    """Lets `sdcomp.export(...)` be short for `sdcomp.export.export(...)`; Python documents this way."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _CallableRoom
