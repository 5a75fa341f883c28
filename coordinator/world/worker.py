"""A worker as the coordinator knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..values import Range, WorkerInfo


@dataclass
class Progress:
    """Of one loading assignment, in bytes."""

    loaded_bytes: int = 0
    total_bytes: int = 0


@dataclass
class Worker:
    """A registered worker: its lease, what it has loaded, and what it could not do."""

    info: WorkerInfo
    renewed_at: float
    """Clock time at which its lease was renewed last."""
    late_s: float = 0.0
    """How late its own clock runs, as it says."""
    kept: Range | None = None
    """Layers whose weights it has loaded."""
    beside: Range | None = None
    """Further layers that it has loaded, beside those that it holds."""
    preparing: Range | None = None
    """Layers that it loads, to hold them later."""
    prepare_after: float = 0.0
    """Clock time before which it is not asked to load, because it just failed."""
    refusals: dict[tuple[int, Range], str] = field(default_factory=dict)
    """(stage, layers) that this incarnation cannot hold, and why."""
    refused_until: float = 0.0
    """Clock time at which the refusals are forgotten: files and memory may be there by then."""
    progress: Progress = field(default_factory=Progress)
    unsettled: bool = True
    """What it reported to hold when it registered has not been looked at yet."""

    def has(self, layers: Range) -> bool:
        """Whether it has loaded these layers."""
        return layers in (self.kept, self.beside)

    def refuse(self, stage: int, layers: Range, reason: str, until: float) -> None:
        """It cannot hold a stage's layers, as far as is known."""
        self.refusals[stage, layers] = reason
        self.refused_until = until
