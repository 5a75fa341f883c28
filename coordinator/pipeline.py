"""A pipeline as the core knows it: its state, the attempt to form it that it is in, and its stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from . import values as v


class State(Enum):
    """Of a pipeline."""

    DOWN = "down"
    FORMING = "forming"
    SERVING = "serving"
    DRAINING = "draining"


class Phase(Enum):
    """Of a forming pipeline."""

    IDLE = "idle"
    ASSIGN = "loading weights"
    LINK = "setting up links"
    ACTIVATE = "activating"
    RETRY = "waiting to try again"


@dataclass
class Pipeline:
    """One pipeline and the attempt it is in."""

    pipeline_id: str
    epoch: int = 0
    state: State = State.DOWN
    phase: Phase = Phase.IDLE
    reason: str = "no worker has registered yet"
    stages: tuple[v.StagePlan, ...] = ()
    last_stages: tuple[v.StagePlan, ...] = ()
    """The stages of the attempt before, for a like placement."""
    loaded: dict[int, v.Loaded] = field(default_factory=dict)
    routes: dict[int, str] = field(default_factory=dict)
    acked: set[int] = field(default_factory=set)
    failures: int = 0
    retry_at: float = 0.0
    serving_since: float = 0.0
    tried: int = -1
    """Membership version at which forming was last tried in vain."""
    final: bool = False
    """Down, and waiting will not help."""
    restored: v.StoredPlan | None = None
    """A plan from before a restart whose workers may still be active."""
    shares: int = 1
    """Pipelines between which its workers' pages are split."""
    leaving: bool = False
    """It is to be no more."""

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds."""
        return next((plan.stage for plan in self.stages if plan.worker_id == worker_id), None)


def num_links(pipeline: Pipeline) -> int:
    """One behind every stage: the last sends its tokens to the first. None where one stage is both."""
    return len(pipeline.stages) if len(pipeline.stages) > 1 else 0
