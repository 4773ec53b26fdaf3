"""Read images from files, and crop them for the judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.files import regular, resolve_input


def center_crop(images: Tensor, side: int) -> Tensor:
    """Resize images `(N, 3, H, W)` in [0, 1] to a shorter side of `side`, and cut out the middle square.

    Returns `(N, 3, side, side)` in [0, 1].
    """
    scale = side / min(images.shape[2:])
    size = [max(side, round(length * scale)) for length in images.shape[2:]]
    images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return images[:, :, top : top + side, left : left + side]


def load_images(path: str | Path, side: int) -> Tensor:
    """Read an image file, or a folder's PNG, JPEG and WebP files by name: `(N, 3, side, side)` in [0, 1].

    Images are resized and cropped by `center_crop`. Raises UserError for a folder without images and for a
    file that is not an image.
    """
    place = resolve_input(path)
    files = [place]
    if not place.is_file():
        files = sorted(f for f in place.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise UserError(f"{str(path)!r} is no image and no folder with PNG, JPEG or WebP images")
    return torch.cat([_load_image(file, side) for file in files])


def _load_image(file: Path, side: int) -> Tensor:
    try:
        with Image.open(regular(file)) as opened:
            pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 255
    # Pillow raises SyntaxError for some damaged PNG files.
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as an image ({error}); remove or replace it") from None
    return center_crop(pixels[None], side)
