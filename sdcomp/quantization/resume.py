"""The checkpoint from which a killed rounding of many layers resumes."""

from __future__ import annotations

from pathlib import Path

from sdcomp.checkpoints import LayerCheckpoint
from sdcomp.quantization.model import QuantModel
from sdcomp.quantization.quantization_files import load_quantization_state, quantization_state


class RoundingCheckpoint(LayerCheckpoint):
    """Keeps a model's grids and rounded weights in a file."""

    def __init__(self, path: str | Path | None, inputs: str) -> None:
        super().__init__(path, "quantization", inputs)

    def resume(self, model: QuantModel) -> set[str]:
        """Take over what was kept; returns the names of the layers that are done. Raises what `read` does."""
        done, calibration = self.read()
        if done:
            load_quantization_state(model, self.path)
            model.calibration |= calibration
        return done

    def keep(self, model: QuantModel, done: set[str], now: bool = False) -> None:
        """Write the state, unless it was written a short while ago; `now` writes it in any case."""
        self.write(lambda: quantization_state(model), done, model.calibration, now)
