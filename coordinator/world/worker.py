"""A worker as the coordinator knows it."""

from __future__ import annotations

from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from ..values import Range, StagePlan


class Worker:
    """A registered worker: its lease, what it has loaded, and what it could not do."""

    def __init__(self, info: RegisterRequest, now: float, unfit: str = "") -> None:
        self.unfit = unfit
        """Why it cannot hold any layers of the model. Empty if it can."""
        self.info = info
        """Its registration."""
        # Copied because policies read them for every worker at every tick, and a message is slow to read.
        self.worker_id, self.incarnation = info.worker_id, info.incarnation
        self.pool, self.any_stage = info.pool, info.any_stage
        self.renewed_at = now
        """Clock time of the last renewal of its lease."""
        self.late_s = 0.0
        """How late its process runs, in seconds, as it reports."""
        self.kept: Range | None = None
        """Layers whose weights it has loaded."""
        self.beside: Range | None = None
        """Further layers that it has loaded, besides those that it holds."""
        self.preparing: Range | None = None
        """Layers that it is loading, to hold them later."""
        self.prepare_after = 0.0
        """Clock time before which it is not asked to load, because it just failed."""
        self.refusals: dict[tuple[int, Range], str] = {}
        """(stage, layers) that this incarnation cannot hold -> why."""
        self.refused_until = 0.0
        """Clock time at which the refusals are forgotten: files and memory may be there by then."""
        self.progress = 0, 0
        """Loaded bytes and total bytes of its assignment."""
        self.fetching = False
        """Whether `progress` is that of files which it fetches from a hub before it loads them."""
        self.unsettled = True
        """The assignments that it reported at registration have not been checked yet."""

    def may_hold(self, stage: int) -> bool:
        """Whether its pool lets it hold `stage`, and it can hold layers of the model."""
        return not self.unfit and (self.any_stage or self.pool in (-1, stage))

    def can_take(self, plan: StagePlan) -> bool:
        """Whether its pool lets it hold the stage, and it has not refused the stage's layers."""
        return self.may_hold(plan.stage) and (plan.stage, plan.layers) not in self.refusals

    def has(self, layers: Range) -> bool:
        """Whether it has loaded these layers."""
        return layers in (self.kept, self.beside)

    def refuse(self, stage: int, layers: Range, reason: str, until: float) -> None:
        """Notes that it cannot hold a stage's layers, until clock time `until`."""
        self.refusals[stage, layers] = reason
        self.refused_until = until
