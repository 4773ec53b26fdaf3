"""Where a call brings its timesteps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

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
