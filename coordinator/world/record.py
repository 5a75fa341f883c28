"""The part of the world that outlives a restart."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..values import StoredPlan


@dataclass
class Record:
    """What a coordinator that is started again has to know. Whatever changes here is written down before anything that
    follows from it is told to anybody."""

    epochs: dict[str, int] = field(default_factory=dict)
    """Pipeline -> the highest epoch that it ever had. Also of pipelines that are no more."""
    plans: dict[str, StoredPlan] = field(default_factory=dict)
    """Pipeline -> as it served last."""
    replicas: dict[int, int] = field(default_factory=dict)
    """Stage -> workers that an operator wants on it at once."""
    counts: tuple[int, ...] | None = None
    """Layers of each stage that are wanted; None: what settings or the cost model say."""
    drains: dict[str, int] = field(default_factory=dict)
    """Worker -> the incarnation of it that drains."""
    forced: frozenset[str] = frozenset()
    """Of those, workers that leave also where nobody takes their stages."""

    def copy(self) -> Record:
        """As it is now. The values are frozen."""
        return Record(
            dict(self.epochs), dict(self.plans), dict(self.replicas), self.counts, dict(self.drains), self.forced
        )
