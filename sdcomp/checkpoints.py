"""Checkpoints of long work on the layers of a model, from which a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdcomp.errors import UserError
from sdcomp.files import source_digest, write_tensors
from sdcomp.settings import plain

_EVERY = 30.0
"""Seconds between two checkpoints, at least."""


class LayerCheckpoint:
    """Keeps tensors in a file, with the names of the layers that are done, and anything else as JSON.

    `work` names what is kept, for messages. `inputs` is all that the result depends on, as text: a checkpoint
    of other inputs, or of other source code, is refused. Without a `path` nothing is kept.
    """

    def __init__(self, path: str | Path | None, work: str, inputs: str) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._work = work
        self._inputs = hashlib.sha256(f"{source_digest()} {inputs}".encode()).hexdigest()
        self._saved = time.monotonic()

    def read(self) -> tuple[set[str], dict[str, object]]:
        """Return the names of the layers that are done, and what else was kept; both are empty at first.

        Raises UserError for a file that is no such checkpoint, or one of other inputs.
        """
        if self.path is None or not self.path.exists():
            return set(), {}
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
            done, more = set(json.loads(about["done"])), dict(json.loads(about["more"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path} is no checkpoint of a {self._work}: delete it or name another"
            ) from None
        if about.get("inputs") != self._inputs:
            raise UserError(
                f"{self.path} is of another {self._work}: delete it, or name another checkpoint; one that"
                " another version of sdcomp wrote cannot be used either"
            )
        return done, more

    def write(
        self,
        tensors: Callable[[], Mapping[str, Tensor]],
        done: set[str],
        more: Mapping[str, object],
        now: bool = False,
    ) -> None:
        """Write the state, unless it was written a short while ago; `now` writes it in any case."""
        if self.path is None or not (now or time.monotonic() - self._saved > _EVERY):
            return
        about = {
            "inputs": self._inputs,
            "done": json.dumps(sorted(done)),
            "more": json.dumps(dict(more), default=plain),
        }
        write_tensors(self.path, tensors(), about)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the result is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
