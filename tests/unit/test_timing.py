"""Times that are scaled as a whole, and relations between them that are refused where they do not hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from stagemesh.errors import ConfigError
from stagemesh.timing import Timing


@dataclass(frozen=True)
class Example(Timing):
    renew_s: float = 0.15
    lease_s: float = 0.6
    tries: int = 3

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.renew_s < self.lease_s, "renew_s < lease_s"


def test_times_are_scaled_and_counts_are_not() -> None:
    assert Example().scaled(2) == Example(0.3, 1.2, 3)


def test_a_relation_that_does_not_hold_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="renew_s < lease_s does not hold"):
        Example(renew_s=1.0)
