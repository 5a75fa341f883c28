"""A pipeline as the coordinator knows it, and the attempts that make it.

    main:    ASSIGN -> LINK -> ACTIVATE -> ACTIVE             a pipeline is formed, and serves
    beside:  ASSIGN -> LINK -> ACTIVATE -> SWITCH -> main     its next epoch, while `main` serves
    either:  a fault (a worker, link or order failed) -> OVER

Every attempt has its own epoch, higher than any before. The epoch is stored before any worker or gateway learns of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from stagemesh.protos.v1 import types_pb2
from stagemesh.protos.v1.stage_pb2 import PipelineKey

from ..values import Loaded, Range, StagePlan, StoredPlan
from .step_times import StepTimes


class State(Enum):
    """State of a pipeline, as gateways see it."""

    DOWN = types_pb2.PIPELINE_STATE_DOWN
    FORMING = types_pb2.PIPELINE_STATE_FORMING
    SERVING = types_pb2.PIPELINE_STATE_SERVING
    DRAINING = types_pb2.PIPELINE_STATE_DRAINING


class Phase(Enum):
    """Phase of an attempt. The values are texts for operators."""

    ASSIGN = "loading weights"
    LINK = "setting up links"
    ACTIVATE = "activating"
    SWITCH = "gateways switch to it"
    ACTIVE = "active"
    OVER = "over"


@dataclass
class Attempt:
    """One epoch of a pipeline, from the first order to its workers to its end.

    Forming a pipeline, moving its layers while it serves, and changing its share of the pages all take the same steps:
    assign the stages, link them, activate them. The difference is data: `beside` says whether the pipeline serves
    meanwhile, and `copies` lists the KV pages that go to other workers.
    """

    pipeline_id: str
    epoch: int
    stages: tuple[StagePlan, ...]
    shares: int = 1
    """Number of pipelines that share each worker's pages."""
    beside: bool = False
    why: str = ""
    copies: tuple[types_pb2.KvCopy, ...] = ()
    phase: Phase = Phase.ASSIGN
    loaded: dict[int, Loaded] = field(default_factory=dict)
    routes: dict[int, str] = field(default_factory=dict)
    """Stage -> route of the link to the next stage: what the transport runs over."""
    copied: set[int] = field(default_factory=set)
    """Indexes of the copies whose link is up."""
    activated: set[int] = field(default_factory=set)
    """Stages whose worker has activated."""
    fault: str = ""
    """Why it failed. Empty if it has not."""
    blameless: bool = False
    """The fault does not count as a failed try, because a worker was lost."""
    deadline: float = math.inf
    switched: set[str] = field(default_factory=set)
    """Gateways that have switched to it."""
    stayed: set[str] = field(default_factory=set)
    """Gateways that could not switch to it."""
    taken_up: bool = False
    """An earlier coordinator told gateways of it, so it is not known which have switched."""

    @property
    def key(self) -> PipelineKey:
        """Key of the attempt in requests."""
        return PipelineKey(pipeline_id=self.pipeline_id, epoch=self.epoch)

    @property
    def num_links(self) -> int:
        """Number of links: one after every stage, as the last stage sends tokens to the first. 0 with one stage."""
        return len(self.stages) if len(self.stages) > 1 else 0

    @property
    def is_being_made(self) -> bool:
        """Whether it waits for answers to its orders."""
        return not self.fault and self.phase in (Phase.ASSIGN, Phase.LINK, Phase.ACTIVATE)

    @property
    def workers(self) -> list[str]:
        """Its workers' ids, in stage order."""
        return [plan.worker_id for plan in self.stages]

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The layers of its stages, in stage order."""
        return tuple(plan.layers for plan in self.stages)

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds in this attempt. None if it holds none."""
        return next((plan.stage for plan in self.stages if plan.worker_id == worker_id), None)


@dataclass
class Leaving:
    """A pipeline is being removed. Its gateways finish its requests, or move them to other pipelines."""

    deadline: float
    gateways: set[str] = field(default_factory=set)
    """Gateways that have left the pipeline."""


@dataclass
class GaveUp:
    """Moves of a pipeline failed. It stays as it is until the time `until`, or until the membership changes."""

    policy: str
    """The policy that asked for the moves."""
    why: str
    until: float


@dataclass
class Pipeline:
    """One pipeline, over all its epochs."""

    pipeline_id: str
    epoch: int = 0
    main: Attempt | None = None
    """The epoch that serves, is being formed, or has failed and will be formed again."""
    beside: Attempt | None = None
    """The next epoch, while `main` serves."""
    reason: str = "no worker has registered yet"
    """Text for operators on why it does not serve."""
    cannot: str = ""
    """The policies' last reason why it cannot be formed."""
    final: bool = False
    """It is down, and waiting will not help."""
    drains: bool = False
    """It takes no new requests, because a worker drains and no other can take its stage."""
    last_stages: tuple[StagePlan, ...] = ()
    """The stages of the last attempt. The next placement keeps them if possible."""
    restored: StoredPlan | None = None
    """A plan from before a restart whose workers may still be active."""
    leaving: Leaving | None = None
    serving_since: float = 0.0
    down_since: float = 0.0
    failures: int = 0
    """Number of failures in a row. Each doubles the pause before the next attempt."""
    retry_at: float = 0.0
    """Clock time before which no attempt begins."""
    moves_failed: int = 0
    """Number of moves that failed in a row."""
    why_moves_failed: str = ""
    move_after: float = 0.0
    """No move begins before this clock time."""
    gave_up: GaveUp | None = None
    unreached: tuple[str, tuple[str, ...]] = ("", ())
    """A gateway's last report: the reason, and the pipeline's workers that it does not reach."""
    steps: StepTimes = field(default_factory=StepTimes)

    @property
    def serving(self) -> Attempt | None:
        """The attempt that serves."""
        main = self.main
        return main if main is not None and main.phase is Phase.ACTIVE and not main.fault else None

    @property
    def state(self) -> State:
        if self.main is None:
            return State.DOWN
        if self.serving is None:
            return State.FORMING
        return State.DRAINING if self.drains or self.leaving else State.SERVING

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """The stages of the main attempt."""
        return self.main.stages if self.main is not None else ()

    @property
    def attempts(self) -> list[Attempt]:
        """The existing attempts, the main one first."""
        return [attempt for attempt in (self.main, self.beside) if attempt is not None]

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds in the main attempt. None if it holds none."""
        return self.main.stage_of(worker_id) if self.main is not None else None
