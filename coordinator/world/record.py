"""The part of the world that outlives a restart."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..values import StoredPlan


@dataclass
class Record:
    """What a coordinator must know after a restart. A change is stored before any action that follows from it."""

    epochs: dict[str, int] = field(default_factory=dict)
    """Pipeline -> the highest epoch that it ever had. Removed pipelines stay in it."""
    plans: dict[str, StoredPlan] = field(default_factory=dict)
    """Pipeline -> its plan when it last served."""
    replicas: dict[int, int] = field(default_factory=dict)
    """Stage -> number of workers that an operator wants on it."""
    counts: tuple[int, ...] | None = None
    """Wanted layer counts per stage. None: the settings or the cost model decide."""
    drains: dict[str, int] = field(default_factory=dict)
    """Draining worker -> the incarnation that drains."""
    forced: frozenset[str] = frozenset()
    """The draining workers that leave even if no other worker can take their stages."""

    def copy(self) -> Record:
        """A copy of the record as it is now. The values are frozen."""
        return Record(
            dict(self.epochs), dict(self.plans), dict(self.replicas), self.counts, dict(self.drains), self.forced
        )
