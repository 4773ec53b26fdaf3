"""Keep generated images on disk: a killed study continues where it stopped, and studies share baselines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcomp.evaluation.float_precision import precision_facts
from sdcomp.files import ROOT, replacing, source_digest
from sdcomp.model import StableDiffusion, Trace, weights_digest

FOLDER = ROOT / "reports" / "runs" / "images"


def cached_images(
    sd: StableDiffusion,
    prompts: list[str],
    *,
    folder: Path = FOLDER,
    progress: bool = False,
    **settings: object,
) -> Tensor:
    """Return `sd.generate(prompts, **settings)`, read from `folder` if it was generated before.

    A file is used again only for the same weights, configuration, prompts, settings, device, number of
    threads, rounding, PyTorch version and source code of everything that makes images. What a part computes
    is known by its tensors and its text, `repr(part)`; hooks are in neither. A damaged file is made again.
    Raises UserError if the folder cannot be written to, before anything is generated, or if the disk is full,
    after the generation.
    """
    path = folder / f"{_key(sd, prompts, settings)}.safetensors"
    return _cached(path, lambda: {"images": sd.generate(prompts, progress=progress, **settings)})["images"]


def cached_trace(
    sd: StableDiffusion,
    prompts: list[str],
    *,
    folder: Path = FOLDER,
    progress: bool = False,
    **settings: object,
) -> Trace:
    """Return the `Trace` of `sd.generate(prompts, **settings)`, cached as in `cached_images`."""

    def make() -> dict[str, Tensor]:
        return vars(sd.generate(prompts, progress=progress, trace=True, **settings)[1])

    return Trace(**_cached(folder / f"{_key(sd, prompts, settings)}-trace.safetensors", make))


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    with suppress(SafetensorError, OSError):
        return load_file(path)
    with replacing(path) as partial:
        made = make()
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, partial)
    return made


def _key(sd: StableDiffusion, prompts: list[str], settings: dict[str, object]) -> str:
    parts = sd.unet, sd.encoder, sd.decoder, sd.text_encoder
    facts = {
        "weights": weights_digest(*parts),
        "structure": [repr(part) for part in parts],
        "config": sd.config.to_dict(),
        "vocabulary": sd.tokenizer.get_vocab(),
        "prompts": prompts,
        "settings": {name: _exact(value) for name, value in settings.items()},
        "type": [str(sd.device), str(sd.dtype)],
        "machine": precision_facts(sd.device),
        "source": source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _exact(value: object) -> str:
    """A value as text, in full; for a tensor a hash. The own text of long arrays leaves out most values."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if hasattr(value, "tolist"):  # arrays of numpy
        value = value.tolist()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_exact, value))}]"
    return repr(value)
