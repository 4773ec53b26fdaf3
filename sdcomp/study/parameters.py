"""A notebook's parameters, checked before anything runs.

A parameters cell declares `name: type = value  # help`. papermill injects a cell of assignments after it.
papermill only warns about a name that the notebook does not have; here such a name stops the run.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any

from sdcomp.errors import UserError
from sdcomp.study.parameter_rules import STUDIES
from sdcomp.study.parameter_rules.common import COMMON, Rule

LONGEST = 4000
"""The longest text, in characters: longer than any path, and than any prompt that a model reads."""


class ParameterError(UserError):
    """A notebook parameter is misspelt, of the wrong type or out of range."""


_NOUNS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
_PLURALS = {"int": "whole numbers", "float": "numbers", "str": "texts"}


def read_parameters(namespace: dict[str, Any], study: str) -> dict[str, Any]:
    """Check the parameters of a study's notebook; `namespace` is its `globals()`.

    The declared and the injected names are read from the cells run so far (`In`). Returns the values by name.
    Raises ParameterError, with one sentence, for a name that is not declared or has no rule, for a value of
    another type, for a value that breaks its rule (`STUDIES`), and for values that contradict each other.
    """
    if study not in STUDIES:
        raise ParameterError(f"the study {study!r} has no rules; write them in sdcomp/study/parameter_rules")
    declared, injected = _declared(namespace)
    for name in injected:
        if name not in declared:
            raise ParameterError(f"there is no parameter {name!r}; this notebook has {', '.join(declared)}")
    rules = STUDIES[study].rules
    if odd := sorted(declared.keys() ^ rules.keys()):
        where = "no rule" if odd[0] in declared else "a rule, and is not declared"
        raise ParameterError(f"the parameter {odd[0]!r} has {where}; see sdcomp/study/parameter_rules")
    values = {name: _check(name, line, namespace[name], rules[name]) for name, line in declared.items()}
    if sentence := STUDIES[study].checks(values):
        raise ParameterError(sentence)
    return values


# What cells declare and inject


def _declared(namespace: dict[str, Any]) -> tuple[dict[str, ast.AnnAssign], list[str]]:
    """The lines of the last parameters cell, by name, and the names that were injected after it."""
    cells = [_parse(source) for source in namespace["In"]]
    found = [
        (i, lines) for i, cell in enumerate(cells) if (lines := _declarations(cell)).keys() >= COMMON.keys()
    ]
    if not found and namespace.get("__annotations__", {}).keys() >= COMMON.keys():
        # nbval runs cells without history, and injects nothing.
        return _declarations(_parse(_written(namespace))), []
    if not found:
        raise ParameterError("run the parameters cell first; each of its lines is `name: type = value`")
    last, declared = found[-1]
    injected = [
        cell
        for source, cell in zip(namespace["In"][last:], cells[last:], strict=True)
        if source.lstrip().partition("\n")[0].rstrip() == "# Parameters"
    ]
    return declared, _assignments(injected[-1]) if injected else []


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # shell and magic lines; characters that Python forbids
        return ast.Module([], [])


def _written(namespace: dict[str, Any]) -> str:
    """The parameters cell, rewritten from its annotations. A list that is empty now may be empty."""
    names = {n: t.__name__ if type(t) is type else repr(t) for n, t in namespace["__annotations__"].items()}
    empty = {n: "[]" if namespace[n] == [] else "None" for n in names}
    return "\n".join(f"{name}: {kind} = {empty[name]}" for name, kind in names.items())


def _declarations(cell: ast.Module) -> dict[str, ast.AnnAssign]:
    """The lines of a cell by name, if all its lines are `name: type = value`; otherwise nothing."""
    if not all(isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) for node in cell.body):
        return {}
    return {node.target.id: node for node in cell.body}


def _assignments(cell: ast.Module) -> list[str]:
    targets = [t for node in cell.body if isinstance(node, ast.Assign) for t in node.targets]
    return [t.id for t in targets if isinstance(t, ast.Name)]


# Types


@dataclass(frozen=True)
class _Kinds:
    """The types that an annotation allows, for plain values and for items of lists."""

    plain: tuple[str, ...]
    items: tuple[str, ...]

    @classmethod
    def of(cls, annotation: ast.expr) -> _Kinds:
        """Of `float`, `list[int]`, or "float or list[float]": papermill does not recognise `float | list`."""
        text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
        written = [part.strip() for part in str(text).replace("|", " or ").split(" or ")]
        items = tuple(t[5:-1] for t in written if t.startswith("list[") and t.endswith("]"))
        plain = tuple(t for t in written if not t.startswith("list["))
        if not set(plain) <= _NOUNS.keys() or not set(items) <= _PLURALS.keys():
            raise ParameterError(
                f"a parameter cannot have the type {text!r}: use int, float, str, bool or list[int]"
            )
        return cls(plain, items)

    @property
    def words(self) -> str:
        lists = [f"a list of {_PLURALS[t]}" for t in self.items]
        return " or ".join([_NOUNS[t] for t in self.plain] + lists)


def _typed(value: Any, types: tuple[str, ...]) -> Any:
    """The value if it has one of these types, else None. An int becomes a float where only that fits."""
    kind = type(value).__name__
    if kind == "int" and "int" not in types and "float" in types:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value if type(value) in (int, float, str, bool) and kind in types else None


def _shown(value: Any) -> str:
    """Any value as one short line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with too many digits; a list that contains itself
        return f"this {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text):,} characters)"


# Values


def _check(name: str, line: ast.AnnAssign, value: Any, rule: Rule) -> Any:
    """The value of a parameter in its declared type."""
    kinds = _Kinds.of(line.annotation)
    if not isinstance(value, list) or not kinds.items:
        return _check_item(name, value, kinds.plain, rule, _wrong_type(name, kinds, value))
    may_be_empty = rule.may_be_empty or (isinstance(line.value, ast.List) and not line.value.elts)
    if not value and not may_be_empty:
        raise ParameterError(f"{name} must not be an empty list")
    for item in value:
        if not isinstance(item, int | float | str) or isinstance(item, bool):
            raise ParameterError(f"{name} must hold plain values, not {_shown(item)}")
    wanted = " or ".join(_PLURALS[t] for t in kinds.items)
    items = [
        _check_item(name, v, kinds.items, rule, f"{name} must be a list of {wanted}, not of {_shown(v)}")
        for v in value
    ]
    if rule.unique and len(set(items)) < len(items):
        raise ParameterError(f"{name} must name each of its values once, not {_shown(value)}")
    return items


def _check_item(name: str, value: Any, types: tuple[str, ...], rule: Rule, wrong_type: str) -> Any:
    item = _typed(value, types)
    if item is None:
        raise ParameterError(wrong_type)
    if isinstance(item, float) and not math.isfinite(item):
        raise ParameterError(f"{name} must be finite, not {_shown(value)}")
    if isinstance(item, str) and (problem := _unusable(item)):
        raise ParameterError(f"{name} must be {problem}, not {_shown(value)}")
    if not rule.takes(item):
        raise ParameterError(f"{name} must be {rule.words}, not {_shown(value)}")
    return item


def _wrong_type(name: str, kinds: _Kinds, value: Any) -> str:
    hint = ""
    if isinstance(value, str) and value.strip().startswith("[") and kinds.items:
        hint = f"; pass a list with -y '{name}: {' '.join(value.split())[:100]}'"
    return f"{name} must be {kinds.words}, not {_shown(value)}{hint}"


def _unusable(text: str) -> str:
    """What a text must be, if neither a file nor a path can hold this one; otherwise empty."""
    if len(text) > LONGEST:
        return f"text of at most {LONGEST:,} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text that UTF-8 can hold"
    return "text without NUL characters" if "\0" in text else ""
