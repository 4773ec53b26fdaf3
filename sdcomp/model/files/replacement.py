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
_FILES_OF_DIFFUSERS = (
    # Weights under other names, such as those of a variant or of shards, and other forms of the tokenizer.
    *(f"{part}/diffusion_pytorch_model*" for part in ("unet", "vae")),
    *("text_encoder/model*", "text_encoder/pytorch_model*"),
    *("tokenizer/tokenizer.json", "tokenizer/added_tokens.json"),
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
    theirs = _FILES_OF_DIFFUSERS if (folder / _DIFFUSERS).exists() else ()
    for name in (_DIFFUSERS, *_KINDS):
        yield folder / name
    for pattern in theirs:
        yield from filter(Path.is_file, folder.glob(pattern))  # the new files wait in folders
