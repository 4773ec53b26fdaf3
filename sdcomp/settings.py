"""Rules for settings: first the type, then the range. A broken rule raises an error of one sentence.

Anyone may have written a file of settings. So a rule can be asked about any value, and it never converts
one: True is not a number, and 8.0 and "8" are not whole numbers.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from sdcomp.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class Rule(Protocol):
    """Tells whether a value is allowed; `str(rule)` says which values are."""

    def __call__(self, value: object) -> bool: ...


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    def __call__(self, value: object) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`, both included; NaN is refused."""

    low: float
    high: float

    def __call__(self, value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class ListOf:
    """A list or tuple of `least` to `most` items, each of which the rule `item` allows.

    If `ascending`, each item must be larger than the one before. If `first` is not None, it must be the
    first item.
    """

    item: Rule
    least: int
    most: int
    ascending: bool = False
    first: object = None

    def __call__(self, value: object) -> bool:
        if not (isinstance(value, list | tuple) and self.least <= len(value) <= self.most):
            return False
        if not all(map(self.item, value)) or (self.first is not None and value[:1] != [self.first]):
            return False
        return not (self.ascending and any(a >= b for a, b in pairwise(value)))

    def __str__(self) -> str:
        order = ", in ascending order" if self.ascending else ""
        order += f", the first {self.first!r}" if self.first is not None else ""
        return f"a list of {self.least} to {self.most} items, each {self.item}{order}"


@dataclass(frozen=True)
class TableOf:
    """A dictionary with texts as keys, and with values that the rule `item` allows."""

    item: Rule

    def __call__(self, value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and self.item(v) for k, v in value.items())

    def __str__(self) -> str:
        return f"a table of names, each with {self.item}"


@dataclass(frozen=True)
class Text:
    """A text of at most `most` characters."""

    most: int = 500

    def __call__(self, value: object) -> bool:
        return isinstance(value, str) and len(value) <= self.most

    def __str__(self) -> str:
        return f"a text of at most {self.most} characters"


class OneOf:
    """One of the given values. The type must be the same too: 1 is not True."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __call__(self, value: object) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))


class AnyOf:
    """A value that at least one of the given rules allows."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def __call__(self, value: object) -> bool:
        return any(rule(value) for rule in self.rules)

    def __str__(self) -> str:
        return " or ".join(map(str, self.rules))


class Anything:
    """Any value; for settings that nothing is computed from."""

    def __call__(self, value: object) -> bool:
        return True

    def __str__(self) -> str:
        return "any value"


FLAG, ANYTHING = OneOf(True, False), Anything()


def is_whole(value: object) -> bool:
    """Whether an argument is a whole number: also one of numpy or torch, but not True or False."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def whole_number(name: str, value: object) -> int:
    """Return the argument `name` as an int. Raises TypeError if it is not a whole number, see `is_whole`."""
    if is_whole(value):
        with suppress(TypeError):  # a tensor of a fraction
            return operator.index(value)
    raise TypeError(f"{name} must be a whole number, not {value!r}")


def plain(value: object) -> object:
    """Turn what JSON does not know into what it does: numbers and arrays of numpy and torch, other series."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def shown(value: object) -> str:
    """A value as text for a sentence: short, on one line."""
    return _SHORT.repr(value)


@contextmanager
def within(name: str) -> Iterator[None]:
    """Put `name` before the message of a UserError that the block raises."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_settings(settings: object, rules: Mapping[str, Rule], optional: Collection[str] = ()) -> None:
    """Check that `settings` has the names of `rules` and no others, and that each value keeps its rule.

    Names in `optional` may be missing. Raises UserError with the setting's name, its value, and its rule.
    """
    check_names(settings, rules)
    for name, rule in rules.items():
        if name not in settings:
            if name not in optional:
                raise UserError(f"{name} is missing; it must be {rule}")
        elif not rule(settings[name]):
            raise UserError(f"{name} is {shown(settings[name])}, but must be {rule}")


def check_names(settings: object, known: Collection[str]) -> None:
    """Raise UserError unless `settings` is a dictionary in which all names are `known`."""
    if not isinstance(settings, dict):
        raise UserError(f"it is {shown(settings)}, but must be a table of settings")
    for name in settings:
        if name not in known:
            raise UserError(f"there is no setting {shown(name)}; remove it")
