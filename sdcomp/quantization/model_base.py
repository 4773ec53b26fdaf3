"""The base of simulated and integer models: called like the module, they find each call's interval."""

from __future__ import annotations

from bisect import bisect_right
from numbers import Real

import torch
from torch import nn

from sdcomp.quantization.timestep_argument import TimestepArgument


class QuantizedModel(nn.Module):
    """A module that stands for `module`, and has `state`, `starts` and `train_timesteps`.

    `_argument`: where a timestep-aware model takes its timesteps, else None.
    """

    _argument: TimestepArgument | None = None

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """The first and last training timestep of each interval, ascending."""
        ends = [*self.starts[1:], self.train_timesteps]
        return [(first, end - 1) for first, end in zip(self.starts, ends, strict=True)]

    def _enter(self, args: tuple, kwargs: dict[str, object]) -> dict[str, object]:
        """Tell the layers this call's interval; returns the keyword arguments to pass on."""
        if self._argument is not None:
            timesteps, kwargs = self._argument.take(args, kwargs)
            self.state.timestep, self.state.interval = self._locate(timesteps)
        return kwargs

    def _locate(self, timesteps: object) -> tuple[float, int]:
        """The lowest timestep of a batch, and the interval of all.

        A plain number is compared in Python, so that such a call waits for no device and can be traced.
        Raises ValueError for timesteps out of range or in different intervals.
        """
        low = high = timesteps
        if not isinstance(timesteps, Real):
            timesteps = torch.as_tensor(timesteps)
            # One look at the device for both.
            low, high = torch.stack(timesteps.aminmax()).tolist()
        # Flow matching begins at `train_timesteps` itself. Written so that nan is refused too.
        if not (low >= 0 and high <= self.train_timesteps):
            raise ValueError(f"timesteps must be 0 to {self.train_timesteps}, not {low} to {high}")
        first, last = map(self.interval_of, (low, high))
        if first != last:
            raise ValueError(
                f"timesteps {low} and {high} of one batch are in different intervals,"
                f" {self.intervals[first]} and {self.intervals[last]}: run them in separate batches"
            )
        return low, first

    def interval_of(self, timestep: float) -> int:
        """Return the number of the interval that holds a timestep."""
        return bisect_right(self.starts, timestep) - 1

    def __getattr__(self, name: str) -> object:
        # What the module tells about itself (its config, its dtype) holds for its quantized twin.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)
