"""A notebook's parameters, checked before anything runs.

A parameters cell declares `name: type = value  # help`, and papermill injects a cell of assignments
after it. papermill only warns about a name that the notebook does not know; here that stops the run.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sdcomp.errors import UserError
from sdcomp.files import find
from sdcomp.model import SAMPLERS
from sdcomp.quantization import PRESETS


class ParameterError(UserError):
    """A notebook parameter is misspelt, of the wrong type or out of range."""


@dataclass(frozen=True)
class Rule:
    """What values of a parameter are good: `accepts(value)`, and the same in words.

    A list may be empty where the rule says so, or where the notebook's own default is.
    """

    accepts: Callable[[Any], bool]
    words: str
    may_be_empty: bool = False


def _one_of(*options: str) -> Rule:
    return Rule(lambda value: value in options, f"one of {', '.join(options)}")


def _between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"between {low:,} and {high:,}")


def _device_there(value: str) -> bool:
    if value == "auto":
        return True
    try:
        torch.ones(1, device=value).item()
    except (RuntimeError, AssertionError):
        return False
    return True


AMOUNT = Rule(lambda value: 0 <= value < 1, "a fraction from 0 to below 1, such as 0.3 for 30 %")
AMOUNTS = replace(AMOUNT, may_be_empty=True)

RULES: dict[str, Rule] = {
    "model": Rule(
        lambda value: find(value).exists(),
        "an existing model folder, such as data/tiny (looked for from here and from the repository)",
    ),
    "amount": AMOUNT,
    "seed": _between(0, 2**31 - 1),
    "n_images": _between(1, 100_000),
    "steps": _between(1, 500),
    "sampler": _one_of(*SAMPLERS),
    "guidance_scale": _between(0, 100),
    "guidance_sweep": _between(0, 100),
    "device": Rule(
        _device_there, "a device that this machine and this PyTorch have, such as cpu or cuda, or auto"
    ),
    "methods": _one_of(*PRESETS),
    "sweep_methods": _one_of(*PRESETS),
    "weight_bits": _between(2, 8),
    "act_bits": _between(2, 8),
    "sweep_bits": _between(2, 8),
    "k": _between(1, 1000),
    "sweep_k": _between(1, 1000),
    "weight_scale_policy": _one_of("max", "mse"),
    "act_scale_policy": _one_of("max", "mse", ""),
    "act_update_policy": _one_of("maximum", "momentum", ""),
    "n_calibration": _between(1, 100_000),
    "calibration_steps": _between(1, 1000),
    "calibration_sampler": _one_of(*SAMPLERS),
    "strength": Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "noise_images": _between(0, 100_000),
    "recover_steps": _between(0, 10_000_000),
    "mode": _one_of("mask", "remove"),
    "scope": _one_of("layer", "global"),
    "score": _one_of("prompt accuracy", "CLIP score"),
    "criterion": _one_of("l1", "l2", ""),
    "recovered_steps": _between(1, 10_000_000),
    "timing_repeats": _between(1, 10_000),
    "method": _one_of(*PRESETS),
    "backends": _one_of("fp32", "simulated", "int8"),
    "weights_only_bits": _between(2, 8),
    "tolerance": _between(0, 100),
    "budgets": Rule(lambda value: 0 < value <= 1, "shares of the fp32 bytes, above 0 and at most 1"),
    **dict.fromkeys(("mask_amounts", "remove_amounts", "recovered_amounts", "sensitivity_amounts"), AMOUNTS),
    "weights_only_amounts": AMOUNTS,
    "train_images": Rule(lambda value: value >= 256 and value % 4 == 0, "a multiple of 4, at least 256"),
    "vae_steps": _between(1, 10_000_000),
    "clip_steps": _between(1, 10_000_000),
    "unet_steps": _between(1, 10_000_000),
    "reader_steps": _between(1, 10_000_000),
}
"""One rule for each parameter that some notebook has; a list is good if each of its items is."""

COMMON = {"model", "seed", "n_images", "steps", "sampler", "guidance_scale", "device", "out"}
"""The parameters that every notebook has."""

_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
}


def read_parameters(namespace: dict[str, Any]) -> dict[str, Any]:
    """Check the parameters of the notebook that runs in `namespace` (its `globals()`) and return them.

    What the notebook declares and what papermill injected is read from the cells run so far (`In`).
    Raises ParameterError, one sentence, for a name that was not declared, a value of another type than
    declared, and one that breaks its rule.
    """
    cells = [_parse(source) for source in namespace["In"]]
    found = [(i, lines) for i, cell in enumerate(cells) if (lines := _declarations(cell)).keys() >= COMMON]
    if not found and namespace.get("__annotations__", {}).keys() >= COMMON:
        # nbval runs cells without history; it injects nothing either.
        found = [(len(cells), _declarations(_parse(_written(namespace))))]
    if not found:
        raise ParameterError("run the parameters cell first; each of its lines is `name: type = value`")
    last, declared = found[-1]
    injected = [
        cell
        for source, cell in zip(namespace["In"][last:], cells[last:], strict=True)
        if source.lstrip().partition("\n")[0].rstrip() == "# Parameters"
    ]
    for name in _assignments(injected[-1]) if injected else []:
        if name not in declared:
            raise ParameterError(f"there is no parameter {name!r}; this notebook has {', '.join(declared)}")
    return {name: _check(name, line, namespace[name]) for name, line in declared.items()}


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # shell and magic lines
        return ast.Module([], [])


def _written(namespace: dict[str, Any]) -> str:
    """The parameters cell, rewritten from what it left in the namespace."""
    names = {
        n: t.__name__ if isinstance(t, type) else repr(t) for n, t in namespace["__annotations__"].items()
    }
    return "\n".join(f"{name}: {kind} = {namespace[name]!r}" for name, kind in names.items())


def _declarations(cell: ast.Module) -> dict[str, ast.AnnAssign]:
    """The lines by name of a cell that only has `name: type = value` lines, else nothing."""
    if not all(isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) for node in cell.body):
        return {}
    return {node.target.id: node for node in cell.body}


def _assignments(cell: ast.Module) -> list[str]:
    targets = [t for node in cell.body if isinstance(node, ast.Assign) for t in node.targets]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _types(annotation: ast.expr) -> list[ast.expr]:
    """The members of a union, in order; any other annotation alone.

    A union may be written "float or list": papermill does not recognise `float | list`.
    """
    if isinstance(annotation, ast.Constant):
        annotation = ast.parse(annotation.value.replace(" or ", " | "), mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return _types(annotation.left) + _types(annotation.right)
    return [annotation]


def _check(name: str, line: ast.AnnAssign, value: Any) -> Any:
    written = [ast.unparse(t) for t in _types(line.annotation)]
    types = [t.partition("[")[0] for t in written]
    may_hold_text = any(t in ("str", "list[str]") for t in written)
    if isinstance(value, int) and not isinstance(value, bool) and "float" in types:
        value = float(value) if "int" not in types else value
    if type(value).__name__ not in types:
        wanted = " or ".join(_NOUNS.get(t, t) for t in types)
        hint = ""
        if isinstance(value, str) and value.strip().startswith("[") and "list" in types:
            hint = f"; pass a list with -y '{name}: {value.strip()}'"
        raise ParameterError(f"{name} must be {wanted}, not {value!r}{hint}")
    rule = RULES.get(name)
    items = value if isinstance(value, list) else [value]
    default_is_empty = isinstance(line.value, ast.List) and not line.value.elts
    if not items and not default_is_empty and not (rule and rule.may_be_empty):
        raise ParameterError(f"{name} must not be an empty list")
    for item in items:
        if isinstance(value, list) and (isinstance(item, bool) or not isinstance(item, int | float | str)):
            raise ParameterError(f"{name} must hold plain values, not {item!r}")
        if isinstance(value, list) and isinstance(item, str) and not may_hold_text:
            raise ParameterError(f"{name} must be a list of numbers, not of {item!r}")
        if isinstance(item, float) and not math.isfinite(item):
            raise ParameterError(f"{name} must be finite, not {item!r}")
        if rule is not None and not rule.accepts(item):
            raise ParameterError(f"{name} must be {rule.words}, not {item!r}")
    return value
