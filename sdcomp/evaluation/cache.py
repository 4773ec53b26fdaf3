"""Generated images, kept on disk: a killed study goes on where it stopped, and baselines are shared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcomp.evaluation.precision import precision_facts
from sdcomp.files import ROOT, replacing
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
    """`sd.generate(prompts, **settings)`, from `folder` where the very same images were made before.

    The same are: weights, configuration, prompts, settings, device, thread count, PyTorch and the source
    of what makes images. A file that is damaged is made anew. Raises UserError when the folder cannot be
    written to: before anything is generated, unless the disk fills up only then.
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
    """As `cached_images`, but the `Trace` of what happened on the way to the images."""

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
    facts = {
        "weights": weights_digest(sd.unet, sd.encoder, sd.decoder, sd.text_encoder),
        "structure": repr(sd.unet),
        "config": sd.config.to_dict(),
        "vocabulary": sd.tokenizer.get_vocab(),
        "prompts": prompts,
        "settings": {name: _exact(value) for name, value in settings.items()},
        "type": [str(sd.device), str(sd.dtype)],
        "machine": precision_facts(sd.device),
        "source": _source(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _source() -> str:
    """A digest of the code that can have a part in an image: all but what judges and reports.

    Taken once: files that change later are not what this process has imported.
    """
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(("evaluation/", "study/")):
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _exact(value: object) -> str:
    """A value as text; a tensor's own text leaves most of it out."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    return repr(value)
