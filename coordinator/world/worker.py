"""A worker as the coordinator knows it."""

from __future__ import annotations

from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from ..values import Range, StagePlan


class Worker:
    """A registered worker: its lease, what it has loaded, and what it could not do."""

    def __init__(self, info: RegisterRequest, now: float) -> None:
        self.info = info
        """As it introduced itself."""
        # Policies read these of every worker at every tick; a message is slow to read.
        self.worker_id, self.incarnation = info.worker_id, info.incarnation
        self.pool, self.any_stage = info.pool, info.any_stage
        self.renewed_at = now
        """Clock time at which its lease was renewed last."""
        self.late_s = 0.0
        """How late its own clock runs, as it says."""
        self.kept: Range | None = None
        """Layers whose weights it has loaded."""
        self.beside: Range | None = None
        """Further layers that it has loaded, beside those that it holds."""
        self.preparing: Range | None = None
        """Layers that it loads, to hold them later."""
        self.prepare_after = 0.0
        """Clock time before which it is not asked to load, because it just failed."""
        self.refusals: dict[tuple[int, Range], str] = {}
        """(stage, layers) that this incarnation cannot hold, and why."""
        self.refused_until = 0.0
        """Clock time at which the refusals are forgotten: files and memory may be there by then."""
        self.progress = 0, 0
        """Bytes of its assignment that it has loaded, and all of them."""
        self.unsettled = True
        """What it reported to hold when it registered has not been looked at yet."""

    def may_hold(self, stage: int) -> bool:
        """Whether its pool lets it hold `stage`."""
        return self.any_stage or self.pool in (-1, stage)

    def can_take(self, plan: StagePlan) -> bool:
        """Whether its pool lets it hold a stage, and it has not failed to load its layers."""
        return self.may_hold(plan.stage) and (plan.stage, plan.layers) not in self.refusals

    def has(self, layers: Range) -> bool:
        """Whether it has loaded these layers."""
        return layers in (self.kept, self.beside)

    def refuse(self, stage: int, layers: Range, reason: str, until: float) -> None:
        """It cannot hold a stage's layers, as far as is known."""
        self.refusals[stage, layers] = reason
        self.refused_until = until
