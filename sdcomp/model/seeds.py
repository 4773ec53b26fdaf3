"""The seeds of images, and the noise that is drawn from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdcomp.settings import whole_number


def image_seeds(seed: int | Sequence[int], prompts: list[str]) -> list[int]:
    """Return the seed of each prompt's image.

    A single `seed` is combined with each prompt and the number of its earlier occurrences; a sequence gives
    one seed for each prompt. Raises TypeError for seeds that are not whole numbers, ValueError for another
    number of seeds and for seeds out of range.
    """
    # A number of numpy or torch, an array without dimensions, is iterable by its class alone.
    if isinstance(seed, Iterable) and not isinstance(seed, str) and getattr(seed, "ndim", 1):
        seeds = [whole_number("seed", s) for s in seed]
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one, or one for each")
        for s in seeds:
            if not 0 <= s < 2**64:
                raise ValueError(f"a seed of an image must be at least 0 and below 2**64, not {s}")
        return seeds
    seed = whole_number("seed", seed)
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        text = f"{seed}\0{seen[prompt]}\0{prompt}".encode(errors="surrogatepass")
        seeds.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)
        seen[prompt] += 1
    return seeds


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a random generator for each image, on the CPU: all devices then start from the same noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def row_noise(generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise `(len(generators), *shape)` on the CPU, each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
