"""Rules for parameters, and those that several studies share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sdcomp.files import resolve_input, resolve_output
from sdcomp.model import SAMPLERS, is_hub_name
from sdcomp.quantization import PRESETS
from sdcomp.quantization.quantizer import BITS as QUANTIZER_BITS
from sdcomp.study.requests import requested


@dataclass(frozen=True)
class Rule:
    """The allowed values of a parameter: `accepts(value)`, and the same in words.

    `accepts` only sees values of the declared type: finite numbers, text that a path can hold. A list is
    allowed if each of its items is. It may be empty if the rule says so, or if the notebook's default is
    empty. If the rule is `unique`, no value may occur twice.
    """

    accepts: Callable[[Any], bool]
    words: str
    may_be_empty: bool = False
    unique: bool = False

    def takes(self, value: Any) -> bool:
        """`accepts(value)`; False for a path that is too long, or that this user may not read."""
        try:
            return self.accepts(value)
        except (OSError, ValueError):
            return False


@dataclass(frozen=True)
class Study:
    """The rules of one study: one for each parameter of its notebook, and `checks` on several together.

    `checks` takes the parameters by name, after each has passed its own rule. It returns one sentence about
    parameters that contradict each other, or None.
    """

    rules: Mapping[str, Rule]
    checks: Callable[[Mapping[str, Any]], str | None] = lambda parameters: None


def one_of(*options: str) -> Rule:
    """One of some texts. The help in the notebook explains the empty one."""
    words = ", ".join(option or "empty" for option in options)
    return Rule(lambda value: value in options, f"one of {words}")


def between(low: float, high: float) -> Rule:
    """A number from `low` to `high`, including both."""
    return Rule(lambda value: low <= value <= high, f"between {low:,} and {high:,}")


def there(path: str) -> Path | None:
    """The file or folder at a path, from here or from the repository's root; None if there is none."""
    found = resolve_input(path)
    return found if found.exists() else None


def _is_model(path: str) -> bool:
    found = there(path)
    if found is None:
        return is_hub_name(path)
    if found.is_file():
        return True
    return any((found / name).is_file() for name in ("config.json", "model_index.json"))


def _device_there(name: str) -> bool:
    if name == "auto":
        return True
    try:
        torch.ones(1, device=name).item()
    except Exception:  # every backend of PyTorch raises other exceptions
        return False
    return True


def _can_be_made(path: str) -> bool:
    """Whether a folder exists or can be made."""
    if not path:
        return True
    folder = resolve_output(path).absolute()
    if any(len(os.fsencode(part)) > 255 for part in folder.parts):
        return False
    nearest = next(part for part in (folder, *folder.parents) if part.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _is_prompt_set(name: str) -> bool:
    if name.endswith((".txt", ".jsonl")):
        return (found := there(name)) is not None and found.is_file()
    return name in ("test", "final", "unseen", "calibration")


def _has_images(path: str) -> bool:
    if not path:
        return True
    found = there(path)
    if found is None or not found.is_dir():
        return found is not None and found.is_file()
    return any(f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for f in found.iterdir())


def _is_clip(name: str) -> bool:
    return not name or is_hub_name(name) or ((found := there(name)) is not None and found.is_dir())


def _is_tolerance(value: float | str) -> bool:
    return value == "" if isinstance(value, str) else 0 <= value <= 100


def _is_guidance(value: float | str) -> bool:
    return value == "" if isinstance(value, str) else 0 <= value <= 100


TOLERANCE = Rule(_is_tolerance, "between 0 and 100, or empty")
FREE = Rule(lambda value: True, "anything")
"""Every value of the declared type."""

AMOUNT = Rule(lambda value: 0 <= value < 1, "a fraction from 0 to below 1, such as 0.3 for 30 %")
AMOUNTS = replace(AMOUNT, may_be_empty=True)
BITS = between(QUANTIZER_BITS.low, QUANTIZER_BITS.high)
COUNT = between(1, 100_000)
VARIANTS = Rule(
    lambda value: requested(value) is not None,
    "pruned variants, such as 'unstructured 0.5 second_order' or 'removed 0.25 recovered 400'",
    may_be_empty=True,
    unique=True,
)
INTERVALS = between(1, 1000)
PRESET = one_of(*PRESETS)
FOLDER = Rule(_can_be_made, "a folder that exists or can be made, or empty")
IMAGES = Rule(_has_images, "an image, or a folder with PNG, JPEG or WebP images, or empty")
PROMPT_SET = Rule(_is_prompt_set, "test, final, unseen, calibration, or an existing .txt or .jsonl file")
CLIP = Rule(_is_clip, "a folder with a CLIP model, the hub name of one, or empty")
TRAINING_STEPS = between(1, 10_000_000)

COMMON = {
    "model": Rule(
        _is_model,
        "an existing model folder or file, such as data/tiny (looked for from here and from the repository),"
        " or a hub name",
    ),
    "out": FREE,  # `Run` tries to write there first, and reports an error
}
"""The rules for parameters of all notebooks."""

GENERATION = {
    "seed": between(0, 2**31 - 1),
    "n_images": COUNT,
    "steps": between(1, 500),
    "sampler": one_of(*SAMPLERS),
    "guidance_scale": Rule(_is_guidance, "between 0 and 100, or empty for the model's own"),
    "dtype": one_of("float32", "bfloat16", "float16"),
    "batch_size": between(0, 4096),
    "device": Rule(
        _device_there, "a device that this machine and this PyTorch have, such as cpu or cuda, or auto"
    ),
}
"""The rules for parameters of notebooks that generate images."""

JUDGING = {"reference": IMAGES, "clip_model": CLIP, "noise_images": between(0, 100_000)}
"""The rules for parameters of notebooks that compare images."""

CALIBRATION = {
    "n_calibration": COUNT,
    "calibration_steps": between(1, 1000),
    "calibration_sampler": one_of(*SAMPLERS),
}
"""The rules for parameters of calibration."""


# Rules on several parameters


def first(*sentences: str | None) -> str | None:
    """The first sentence that is not None."""
    return next((sentence for sentence in sentences if sentence), None)


def check_recovery(p: Mapping[str, Any]) -> str | None:
    """Recovery needs float32."""
    recovered = [text for text in p["variants"] if requested(text).recover_steps]
    if p["dtype"] != "float32" and (recovered or p.get("recover_steps")):
        return f"recovery trains in float32, not {p['dtype']}: set dtype to float32, or recover nothing"
    return None


def check_pairs(p: Mapping[str, Any]) -> str | None:
    """Two lists of bits must have one length."""
    w, a = (len(p[name]) if isinstance(p[name], list) else 1 for name in ("weight_bits", "act_bits"))
    if 1 in (w, a) or w == a:
        return None
    return f"weight_bits and act_bits are paired: give lists of one length, not of {w} and {a}"


def check_k(p: Mapping[str, Any], *intervals: int, name: str = "k") -> str | None:
    """At most as many timestep intervals as calibration steps. `check_calibration` asks the model too."""
    most = max(intervals, default=0)
    if most > p["calibration_steps"]:
        return f"{name} must be at most calibration_steps, {p['calibration_steps']}, not {most}"
    return None


def check_openvino(p: Mapping[str, Any]) -> str | None:
    """Refuse the backend of an engine that is not installed."""
    if "openvino" in p["backends"] and find_spec("openvino") is None:
        return "backends has openvino, which is not installed: pip install -e '.[deploy]', or remove it"
    return None
