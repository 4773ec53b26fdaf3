"""Rules for settings: type first, then range. What breaks one is said in one sentence.

Settings come from files that anyone may have written, so a rule takes any value and never converts one:
True is no number, 8.0 and "8" are no whole numbers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from sdcomp.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class Rule(Protocol):
    """Tells whether a value is allowed; its text says what is."""

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
    """A finite number from `low` to `high`, both included; NaN is in no range."""

    low: float
    high: float

    def __call__(self, value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class ListOf:
    """A list of `least` to `most` items that one rule allows.

    `ascending`: each is above the one before. `first`: the first must be this, if it is not None.
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
    """A table of texts to values that one rule allows."""

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
    """One of some values, of the same type."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __call__(self, value: object) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.values))


class AnyOf:
    """What one of some rules allows."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def __call__(self, value: object) -> bool:
        return any(rule(value) for rule in self.rules)

    def __str__(self) -> str:
        return " or ".join(map(str, self.rules))


class Anything:
    """What nothing is computed with."""

    def __call__(self, value: object) -> bool:
        return True

    def __str__(self) -> str:
        return "any value"


FLAG, ANYTHING = OneOf(True, False), Anything()


def shown(value: object) -> str:
    """A value as it stands in a sentence: short, on one line."""
    return _SHORT.repr(value)


@contextmanager
def within(name: str) -> Iterator[None]:
    """What is found wrong in here is wrong in the table `name`, and the sentence says so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def check_settings(settings: object, rules: Mapping[str, Rule], optional: Collection[str] = ()) -> None:
    """Check that the table `settings` has what `rules` name and no more, each as its rule says.

    `optional` settings may be missing. Raises UserError, which names the setting, its value, and what it
    must be.
    """
    check_names(settings, rules)
    for name, rule in rules.items():
        if name not in settings:
            if name not in optional:
                raise UserError(f"{name} is missing; it must be {rule}")
        elif not rule(settings[name]):
            raise UserError(f"{name} is {shown(settings[name])}, but must be {rule}")


def check_names(settings: object, known: Collection[str]) -> None:
    """Raise UserError unless `settings` is a table without unknown names."""
    if not isinstance(settings, dict):
        raise UserError(f"it is {shown(settings)}, but must be a table of settings")
    for name in settings:
        if name not in known:
            raise UserError(f"there is no setting {shown(name)}; remove it")
