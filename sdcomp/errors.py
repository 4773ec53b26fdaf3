"""Errors that tell a user what to do, and look like one sentence in a notebook too."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what to do."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows these lines in place of a stack trace.
        return [f"{type(self).__name__}: {self}"]


class NonFiniteError(UserError, FloatingPointError):
    """A model gave infinite values or NaN; the message names the step."""
