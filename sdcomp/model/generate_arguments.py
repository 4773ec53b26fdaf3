"""The arguments of `generate`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from sdcomp.model.batch_size import default_batch_size
from sdcomp.model.config import ModelConfig
from sdcomp.model.image_to_image import check_image, first_step
from sdcomp.model.seeds import image_seeds
from sdcomp.settings import whole_number


@dataclass(frozen=True)
class Request:
    """The arguments of one call of `generate` in their final form.

    `negatives` has one entry, or one for each prompt; `seeds` has one for each prompt; `image` is
    `(1 or N, 3, H, W)` or None; `pixels` is (height, width); `shape` is `(C, h, w)`, the shape of one
    image's latents; `first` is the index of the first step that runs.
    """

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    steps: int
    first: int
    scale: float
    image: Tensor | None
    pixels: tuple[int, int]
    shape: tuple[int, int, int]
    batch_size: int
    pad: bool

    def batches(self) -> list[list[int]]:
        """The indices of the prompts by batch; `pad` fills the last batch with copies of its last row."""
        n, size = len(self.prompts), self.batch_size
        batches = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
        return [rows + rows[-1:] * (size - len(rows)) for rows in batches] if self.pad else batches


def check_request(
    config: ModelConfig,
    prompts: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str],
    steps: int,
    guidance_scale: float | None,
    seed: int | Sequence[int],
    image: Tensor | None,
    strength: float,
    size: tuple[int, int] | None,
    batch_size: int | None,
    pad: bool,
) -> Request:
    """Check the arguments of `StableDiffusion.generate`, and return them; raises the errors named there."""
    prompts, negatives = as_texts("prompts", prompts), as_texts("negative_prompt", negative_prompt)
    n = len(prompts)
    if len(negatives) not in (1, n):
        raise ValueError(f"{len(negatives)} negative prompts for {n} prompts: give one, or one for each")
    if batch_size is not None and whole_number("batch_size", batch_size) < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if not isinstance(pad, bool):
        raise TypeError(f"pad must be True or False, not {pad!r}")
    scale = config.guidance_scale if guidance_scale is None else _number("guidance_scale", guidance_scale)
    if not 0 <= scale <= 1000:
        raise ValueError(f"guidance_scale must be 0 or more, and at most 1000, not {guidance_scale}")
    if not 0 < _number("strength", strength) <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    steps = whole_number("steps", steps)
    if image is not None:
        image = check_image(image, n, size)
        size = tuple(image.shape[2:])
    pixels = image_pixels(config, size)
    return Request(
        prompts=prompts,
        negatives=negatives,
        seeds=image_seeds(seed, prompts),
        steps=steps,
        first=0 if image is None else first_step(steps, strength),
        scale=scale,
        image=image,
        pixels=pixels,
        shape=_latent_shape(config, pixels),
        batch_size=batch_size or default_batch_size(pixels),
        pad=pad,
    )


def image_pixels(config: ModelConfig, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images; `None` means the model's own. Raises TypeError."""
    if size is None:
        return config.image_size, config.image_size
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size must be (height, width), not {size!r}")
    return whole_number("size", size[0]), whole_number("size", size[1])


def as_texts(name: str, value: str | Sequence[str]) -> list[str]:
    """Return one text or several texts as a list. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be text or a list of texts")
    return texts


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _latent_shape(config: ModelConfig, pixels: tuple[int, int]) -> tuple[int, int, int]:
    height, width = pixels
    f = config.vae.downsampling
    factor = f * 2 ** (len(config.unet.channel_mult) - 1)
    if height < factor or width < factor or height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, not {height} and {width}")
    return config.unet.in_channels, height // f, width // f
