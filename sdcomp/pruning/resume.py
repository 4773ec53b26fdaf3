"""The checkpoint from which a killed pruning of many layers resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sdcomp.checkpoints import LayerCheckpoint
from sdcomp.errors import UserError
from sdcomp.model import weights_digest
from sdcomp.model.files.tensors import read_safetensors


class PruningCheckpoint(LayerCheckpoint):
    """Keeps the weights of the layers that are pruned in a file, and the `amounts` of all layers.

    `module` is what is pruned, as it is before; `inputs` is all else that the result depends on, as text.
    """

    def __init__(self, path: str | Path | None, module: nn.Module, inputs: str) -> None:
        super().__init__(path, "pruning", "" if path is None else f"{weights_digest(module)} {inputs}")
        self._done: set[str] = set()
        self.amounts: dict[str, float] = {}

    @torch.no_grad()
    def resume(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Give layers the weights that were kept; returns their names. Raises what `read` does."""
        self._done, self.amounts = self.read()
        if self._done:
            for name, weight in read_safetensors(self.path, UserError).items():
                layers[name].weight.copy_(weight)
        return set(self._done)

    def keep(self, layers: Mapping[str, nn.Module], name: str) -> None:
        """Note that the layer `name` is done, and write the file unless it was written a short while ago."""
        self._done.add(name)
        self._write(layers)

    def keep_amounts(self, amounts: dict[str, float]) -> dict[str, float]:
        """Write how much of each layer will be pruned; returns it."""
        self.amounts = amounts
        self._write({}, now=True)
        return amounts

    def _write(self, layers: Mapping[str, nn.Module], now: bool = False) -> None:
        self.write(lambda: {name: layers[name].weight for name in self._done}, self._done, self.amounts, now)
