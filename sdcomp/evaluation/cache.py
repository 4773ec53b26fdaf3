"""Generated images, kept on disk: a killed study goes on where it stopped, and baselines are shared."""

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

import sdcomp
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
    package = Path(sdcomp.__file__).parent
    files = [file for part in ("model", "quantization", "pruning") for file in (package / part).glob("*.py")]
    if not any(".int8" in type(module).__module__ for module in sd.unet.modules()):
        files = [file for file in files if not file.name.startswith("int8")]
    source = b"".join(file.read_bytes() for file in sorted(files))
    facts = {
        "weights": weights_digest(sd.unet, sd.encoder, sd.decoder, sd.text_encoder),
        "structure": repr(sd.unet),
        "config": sd.config.to_dict(),
        "vocabulary": sd.tokenizer.get_vocab(),
        "prompts": prompts,
        "settings": {name: _exact(value) for name, value in settings.items()},
        "machine": [str(sd.device), str(sd.dtype), torch.get_num_threads(), torch.__version__],
        "source": hashlib.sha256(source).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _exact(value: object) -> str:
    """A value as text; a tensor's own text leaves most of it out."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    return repr(value)
