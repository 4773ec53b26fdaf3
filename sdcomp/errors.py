"""Errors for users: one sentence that says what is wrong and what to do, in a notebook too."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows these lines instead of a stack trace.
        return [f"{type(self).__name__}: {self}"]


class NonFiniteError(UserError, FloatingPointError):
    """A computation gave infinite values or NaN; the message says where."""
