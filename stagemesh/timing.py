"""Base of the frozen objects that hold a service's times. Tests and operators scale such an object as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

from stagemesh.errors import ConfigError


@dataclass(frozen=True)
class Timing:
    """Times of one service. Fields that end in `_s` are seconds. `scaled` does not change other fields.

    A subclass states in `relations` what must hold between its times. Raises ConfigError if a relation does not hold.
    """

    def __post_init__(self) -> None:
        for holds, what in self.relations():
            if not holds:
                raise ConfigError(f"{type(self).__name__}: {what} does not hold: {self}")

    def relations(self) -> Iterator[tuple[bool, str]]:
        """Yields (whether it holds, the relation in words)."""
        yield from ()

    def scaled(self, factor: float) -> Self:
        """Returns a copy with every time multiplied by `factor`: above 1 for slow machines, below 1 for fast tests."""
        times = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name.endswith("_s")}
        return replace(self, **times)
