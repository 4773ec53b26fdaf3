"""One model in a folder: a new one takes the place of the old one, whatever the formats of the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from sdcomp.files import together

_OURS, _DIFFUSERS = "config.json", "model_index.json"
"""The files by which `load` knows a folder of ours and one of diffusers. They come last."""

_KINDS = (
    # Of a quantized UNet, and of the record beside any UNet (`sdcomp.saving`).
    "compression.json",
    *(f"{name}.{kind}" for name in ("int8", "packed", "quantization") for kind in ("json", "safetensors")),
    # Of a UNet that lost channels, in our folder and in that of diffusers.
    "unet_channels.json",
    "unet/unet_channels.json",
)


def replacing_model(folder: Path) -> AbstractContextManager[None]:
    """Write a model into a folder: all its files take their places at the end of the block.

    All that made the folder load as an earlier model is removed first. So a killed save leaves the old model
    or the new one, or for a moment a folder that `load` refuses. Blocks may be nested.
    """
    return together(lambda: _stale(folder), (folder / _OURS, folder / _DIFFUSERS))


def _stale(folder: Path) -> Iterator[Path]:
    # Other programs have a config.json too; that beside vae.safetensors is ours.
    if (folder / "vae.safetensors").exists():
        yield folder / _OURS
        yield folder / "unet.safetensors"
    for name in (_DIFFUSERS, *_KINDS):
        yield folder / name
