"""The base of simulated and integer models: called like the module, they find each call's interval."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn

from sdcomp.settings import is_whole


@dataclass(frozen=True)
class TimestepArgument:
    """Where a module's `forward` takes its timesteps: by position, by name, or both.

    `position` is None for a name that `forward` does not have; the wrapper takes this argument for itself.
    """

    given: int | str
    position: int | None
    name: str | None

    @classmethod
    def of(cls, module: nn.Module, given: int | str | None) -> TimestepArgument:
        """The argument at a position or of a name. Raises TypeError for anything else.

        None finds the position of the argument named `timestep` or `timesteps`; without one it is 1.
        """
        names = [
            p.name
            for p in inspect.signature(module.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if given is None:
            given = next((i for i, name in enumerate(names) if name in ("timestep", "timesteps")), 1)
        if isinstance(given, str):
            return cls(given, names.index(given) if given in names else None, given)
        if not is_whole(given) or given < 0:
            raise TypeError(f"timestep_arg must be a position or a name, not {given!r}")
        return cls(given, given, names[given] if given < len(names) else None)

    def take(self, args: tuple, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        """The timesteps of a call, and the keyword arguments that the module gets.

        Raises TypeError for a call without timesteps.
        """
        if self.position is not None and self.position < len(args):
            return args[self.position], kwargs
        if self.name not in kwargs:
            raise TypeError(
                f"a timestep-aware model needs its timesteps, in argument {self.name or self.given!r}"
            )
        if self.position is None:
            return kwargs[self.name], {key: value for key, value in kwargs.items() if key != self.name}
        return kwargs[self.name], kwargs


class QuantizedWrapper(nn.Module):
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
