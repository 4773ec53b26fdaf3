"""Second-order rounding: GPTQ (Frantar et al. 2023) for convolutions and linear layers.

Rounding to nearest changes each weight by itself. A change D of the weight matrix costs the layer's output
the squared error tr(D H D^T), with H the second moments of the inputs. The columns are rounded in order, and
the columns after each compensate for as much of its error as they can: see `sdcomp.column_sweep`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdcomp.column_sweep import DAMPING, descend, inverse_factor, sweep
from sdcomp.moments import ROWS
from sdcomp.quantization.layers import QuantLayer
from sdcomp.quantization.quantizer import UniformQuantizer, fake_quantize
from sdcomp.quantization.scales import Grid


@dataclass(frozen=True)
class SecondOrderRounding:
    """Rounds weights by GPTQ, algorithm 1, with the layer's own grids, and improves them by QuantEase.

    `rows`: inputs of a layer that each call of the model contributes to H. `damping`: added to the diagonal
    of H, as a share of its mean. `passes`: how often each column is chosen once more (Behdin et al. 2023).
    The grid of a group of columns is found when the sweep reaches it, from weights that compensate for the
    columns before; other grids stay as they are.

    Weights that are exactly zero stay so, and the others make up for that: a pruned layer keeps its zeros.
    """

    rows: int = ROWS
    damping: float = DAMPING
    passes: int = 3

    def __call__(self, layer: QuantLayer, moments: Tensor) -> None:
        """Give a layer its rounded weight; `moments` is H, `(columns, columns)`."""
        weight = layer.rounded_part().flatten(1)
        rounding = _Rounding(layer, weight == 0)
        block = rounding.group or 128
        rounded = sweep(weight, inverse_factor(moments, self.damping), rounding, block=block)
        rounded = descend(weight, rounded, moments, rounding, passes=self.passes, damping=self.damping)
        layer.set_rounded(rounded, [rounding.grid_of_groups()] if rounding.group else None)


class _Rounding:
    """The `sdcomp.column_sweep.ColumnRule` that rounds columns to a layer's grids, and keeps its `zeros`."""

    def __init__(self, layer: QuantLayer, zeros: Tensor) -> None:
        self.zeros = zeros
        self.quantizer: UniformQuantizer = layer.weight_quantizer
        self.group = self.quantizer.group_size if self.quantizer.granularity == "group" else 0
        # The first column of each part of the weight, and the part's grid; groups come later.
        columns = 0
        self._grids: list[tuple[int, Grid]] = []
        if not self.group:
            sizes = [layer.weight.shape[1]] if layer.split is None else [layer.split, 0]
            for size, grid in zip(sizes, layer.weight_grids(), strict=True):
                self._grids.append((columns, grid))
                columns += size * layer.weight[0, 0].numel()

    def begin(self, block: Tensor, cost: Tensor, start: int) -> None:
        """Find the grid of the group that begins here."""
        if self.group:
            zeros = self.zeros[:, start : start + block.shape[1]]
            grid = self.quantizer.grid(block.masked_fill(zeros, 0))
            self._grids.append((start, Grid(*(part if part is None else part[:, 0] for part in grid))))

    def column(self, values: Tensor, index: int) -> Tensor:
        """Round a column, but keep its zeros."""
        scale, zero_point = next(grid for start, grid in reversed(self._grids) if start <= index)
        low, high = self.quantizer.bounds(zero_point)
        return fake_quantize(values, scale, high, low).masked_fill(self.zeros[:, index], 0)

    def grid_of_groups(self) -> Grid:
        """Return the grids of all groups, `(out, groups)`."""
        scales, zeros = zip(*(grid for _, grid in self._grids), strict=True)
        return Grid(torch.stack(scales, 1), None if zeros[0] is None else torch.stack(zeros, 1))
