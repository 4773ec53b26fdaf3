"""Checkpoints from which a killed rounding of many layers resumes."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdcomp.errors import UserError
from sdcomp.files import replacing
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.quantization_files import load_quantization_state, quantization_state

_EVERY = 30.0
"""Seconds between two checkpoints, at least."""


class RoundingCheckpoint:
    """Keeps a model's grids and rounded weights in a file, with the names of the layers that are done.

    `inputs` is all that the result depends on, as text: a checkpoint of other inputs is refused. Without a
    `path` nothing is kept.
    """

    def __init__(self, path: Path | None, inputs: str) -> None:
        self.path = path
        self._inputs = hashlib.sha256(inputs.encode()).hexdigest()
        self._saved = time.monotonic()

    def resume(self, model: QuantModel) -> set[str]:
        """Take over what was kept; returns the names of the layers that are done.

        Raises UserError for a file that is no such checkpoint, or one of other inputs.
        """
        if self.path is None or not self.path.exists():
            return set()
        try:
            with safe_open(self.path, "pt") as file:
                about = file.metadata() or {}
            done = set(json.loads(about["done"]))
            calibration = json.loads(about["calibration"])
        except (SafetensorError, OSError, KeyError, ValueError):
            raise UserError(
                f"{self.path} is no checkpoint of a quantization: delete it or name another"
            ) from None
        if about.get("inputs") != self._inputs:
            raise UserError(f"{self.path} is of another quantization: delete it, or name another checkpoint")
        load_quantization_state(model, self.path)
        model.calibration |= calibration
        return done

    def keep(self, model: QuantModel, done: set[str], now: bool = False) -> None:
        """Write the state, unless it was written a short while ago; `now` writes it in any case."""
        if self.path is None or not (now or time.monotonic() - self._saved > _EVERY):
            return
        tensors = {name: t.detach().cpu().contiguous() for name, t in quantization_state(model).items()}
        about = {"inputs": self._inputs, "done": json.dumps(sorted(done))}
        about["calibration"] = json.dumps(model.calibration)
        with replacing(self.path) as partial:
            save_file(tensors, partial, about)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the result is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
