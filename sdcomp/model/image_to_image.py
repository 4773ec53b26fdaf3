"""Image-to-image (Meng et al. 2022, "SDEdit"): which image it starts from, and at which step."""

from __future__ import annotations

from torch import Tensor


def first_step(steps: int, strength: float) -> int:
    """The index of the first step that runs: a share of `strength` of all steps runs, at least one step."""
    return steps - max(1, min(int(steps * strength), steps))


def check_image(image: Tensor, n: int, size: tuple[int, int] | None) -> Tensor:
    """Return the image or images for `n` prompts as `(1 or n, 3, H, W)`. Raises TypeError and ValueError."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError("image must be a floating-point tensor with values in [0, 1]")
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[1] != 3 or len(image) not in (1, n):
        raise ValueError(f"image must be (1 or {n}, 3, H, W), not {tuple(image.shape)}")
    # This form refuses NaN too.
    if not ((image >= 0) & (image <= 1)).all():
        raise ValueError("image must have values in [0, 1]")
    if size is not None and tuple(size) != tuple(image.shape[2:]):
        raise ValueError("size and image disagree: leave size out, or resize the image first")
    return image
