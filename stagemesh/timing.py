"""Times of a service in one frozen place: its owner declares them, tests and operators scale them as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

from stagemesh.errors import ConfigError


@dataclass(frozen=True)
class Timing:
    """Base of each service's times. Fields are seconds and end in `_s`; anything else is left alone by `scaled`.

    A subclass states in `relations` what must hold between them. Raises ConfigError where one does not.
    """

    def __post_init__(self) -> None:
        for holds, what in self.relations():
            if not holds:
                raise ConfigError(f"{type(self).__name__}: {what} does not hold: {self}")

    def relations(self) -> Iterator[tuple[bool, str]]:
        """(whether it holds, the relation in words)."""
        yield from ()

    def scaled(self, factor: float) -> Self:
        """The same with every time `factor` as long: for slow machines, and for tests that are in a hurry."""
        times = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name.endswith("_s")}
        return replace(self, **times)
