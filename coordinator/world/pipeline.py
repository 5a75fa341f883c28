"""A pipeline as the coordinator knows it, and the attempts that make it.

    main:    ASSIGN -> LINK -> ACTIVATE -> ACTIVE             a pipeline is formed, and serves
    beside:  ASSIGN -> LINK -> ACTIVATE -> SWITCH -> main     its next epoch, while `main` serves
    either:  a fault (a worker, link or order failed) -> OVER

Every attempt has an epoch of its own, higher than any before it. It is written down before anyone hears of it.
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
    """Of a pipeline, as gateways see it."""

    DOWN = types_pb2.PIPELINE_STATE_DOWN
    FORMING = types_pb2.PIPELINE_STATE_FORMING
    SERVING = types_pb2.PIPELINE_STATE_SERVING
    DRAINING = types_pb2.PIPELINE_STATE_DRAINING


class Phase(Enum):
    """Of an attempt."""

    ASSIGN = "loading weights"
    LINK = "setting up links"
    ACTIVATE = "activating"
    SWITCH = "gateways switch to it"
    ACTIVE = "active"
    OVER = "over"


@dataclass
class Attempt:
    """One epoch of a pipeline, from the first order to its workers until it is over.

    Forming a pipeline, moving its layers beside serving, and changing its share of the pages are the same: assign the
    stages, link them, activate them. What differs is data: `beside` says that the pipeline serves meanwhile, `copies`
    which KV pages change hands.
    """

    pipeline_id: str
    epoch: int
    stages: tuple[StagePlan, ...]
    shares: int = 1
    """Pipelines between which the workers' pages are split."""
    beside: bool = False
    why: str = ""
    copies: tuple[types_pb2.KvCopy, ...] = ()
    phase: Phase = Phase.ASSIGN
    loaded: dict[int, Loaded] = field(default_factory=dict)
    routes: dict[int, str] = field(default_factory=dict)
    """Stage -> what the link behind it is made of."""
    copied: set[int] = field(default_factory=set)
    """Copies whose link stands."""
    activated: set[int] = field(default_factory=set)
    fault: str = ""
    """Why it is over, or is not to be."""
    blameless: bool = False
    """The fault says nothing of the next try: a worker was lost."""
    deadline: float = math.inf
    switched: set[str] = field(default_factory=set)
    """Gateways that have switched to it."""
    stayed: set[str] = field(default_factory=set)
    """Gateways that could not."""
    taken_up: bool = False
    """A coordinator before this one has told gateways of it: who has switched is not known."""

    @property
    def key(self) -> PipelineKey:
        """Its name in requests."""
        return PipelineKey(pipeline_id=self.pipeline_id, epoch=self.epoch)

    @property
    def num_links(self) -> int:
        """One behind every stage: the last sends its tokens to the first. None where one stage is both."""
        return len(self.stages) if len(self.stages) > 1 else 0

    @property
    def is_being_made(self) -> bool:
        """Whether answers to orders are waited for."""
        return not self.fault and self.phase in (Phase.ASSIGN, Phase.LINK, Phase.ACTIVATE)

    @property
    def workers(self) -> list[str]:
        """Its workers, in stage order."""
        return [plan.worker_id for plan in self.stages]

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The layers of its stages."""
        return tuple(plan.layers for plan in self.stages)

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds in it."""
        return next((plan.stage for plan in self.stages if plan.worker_id == worker_id), None)


@dataclass
class Leaving:
    """A pipeline is to be no more; its gateways finish what it runs, or let other pipelines do that."""

    deadline: float
    gateways: set[str] = field(default_factory=set)
    """Those that have left."""


@dataclass
class GaveUp:
    """Moves failed; the pipeline is left as it is until something changes."""

    policy: str
    """The policy that had wanted them."""
    why: str
    until: float


@dataclass
class Pipeline:
    """One pipeline over all its epochs."""

    pipeline_id: str
    epoch: int = 0
    main: Attempt | None = None
    """The epoch that serves, is being formed, or was lost and is to be formed anew."""
    beside: Attempt | None = None
    """The next epoch, while `main` serves."""
    reason: str = "no worker has registered yet"
    """Why it does not serve, for people."""
    cannot: str = ""
    """Why nothing can be formed, as the policies said it last."""
    final: bool = False
    """It is down, and waiting will not help."""
    drains: bool = False
    """It takes nothing new: a worker drains and nobody takes its place."""
    last_stages: tuple[StagePlan, ...] = ()
    """The stages of the last attempt, for a like placement."""
    restored: StoredPlan | None = None
    """A plan from before a restart whose workers may still be active."""
    leaving: Leaving | None = None
    serving_since: float = 0.0
    down_since: float = 0.0
    failures: int = 0
    """In a row, for the pause before the next attempt."""
    retry_at: float = 0.0
    moves_failed: int = 0
    """In a row."""
    why_moves_failed: str = ""
    move_after: float = 0.0
    """No move begins before this clock time."""
    gave_up: GaveUp | None = None
    unreached: tuple[str, tuple[str, ...]] = ("", ())
    """What a gateway reported: why, and which of its workers it does not reach."""
    steps: StepTimes = field(default_factory=StepTimes)

    @property
    def serving(self) -> Attempt | None:
        """The epoch that serves."""
        main = self.main
        return main if main is not None and main.phase is Phase.ACTIVE and not main.fault else None

    @property
    def state(self) -> State:
        """As gateways see it."""
        if self.main is None:
            return State.DOWN
        if self.serving is None:
            return State.FORMING
        return State.DRAINING if self.drains or self.leaving else State.SERVING

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """Of the main attempt."""
        return self.main.stages if self.main is not None else ()

    @property
    def attempts(self) -> list[Attempt]:
        """Those there are: the main one first."""
        return [attempt for attempt in (self.main, self.beside) if attempt is not None]

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds in the main attempt."""
        return self.main.stage_of(worker_id) if self.main is not None else None
