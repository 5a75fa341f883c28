"""All that the coordinator knows, as data with small queries: workers, pipelines, gateways, the record, beliefs.

Events change it (observe/), and so does the progress of attempts (core/reconcile.py). Policies only read it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from stagemesh.protocol import MOVES
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from ..planning.kinds import kinds
from ..planning.placement import Candidate
from ..planning.target import CannotForm, Target
from ..timing import CoordinatorTiming
from ..values import Range, StoredPlan
from .pipeline import Attempt, Phase, Pipeline
from .record import Record
from .worker import Worker

UNLIMITED = 1 << 30
T = TypeVar("T")


@dataclass
class Gateway:
    """A gateway that watches the mesh, or did a moment ago."""

    streams: int = 0
    gone_at: float = 0.0
    knows_moves: bool = True
    """Whether its protocol version has moves."""


@dataclass
class Beliefs:
    """Beliefs that end: most with the clock time at which they do."""

    apart: dict[frozenset[str], float] = field(default_factory=dict)
    """Pairs of workers whose link did not come up -> when that is forgotten."""
    away: dict[str, float] = field(default_factory=dict)
    """Workers that a gateway does not reach -> when that is forgotten."""
    missed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Lost worker -> (the stage that it was started for, until when it counts as a replica of it)."""
    ucx_failed: dict[frozenset[int], list[str]] = field(default_factory=dict)
    """Incarnations of a link's two ends -> errors of UCX between them. Ends when either worker is lost."""
    lost_with: dict[str, int] = field(default_factory=dict)
    """Worker that was lost while it held the stage that it was started for -> that stage."""

    def expire(self, now: float) -> bool:
        """Drops beliefs that have ended. Returns whether there were any."""
        before = len(self.apart) + len(self.away) + len(self.missed)
        self.apart = {pair: until for pair, until in self.apart.items() if until > now}
        self.away = {name: until for name, until in self.away.items() if until > now}
        self.missed = {name: (stage, until) for name, (stage, until) in self.missed.items() if until > now}
        return len(self.apart) + len(self.away) + len(self.missed) < before


class World:
    """All that the coordinator knows. See the module."""

    def __init__(
        self,
        target: Target,
        *,
        now: float,
        nonce: Callable[[], int],
        timing: CoordinatorTiming,
        record: Record | None = None,
        first_epoch: int = 1,
    ) -> None:
        """`nonce`: makes generations and link nonces. No new epoch is below `first_epoch`."""
        self.settings = target
        """The target of settings and checkpoint, without an operator's layer counts; see `target`."""
        self.timing = timing
        self.nonce = nonce
        self.record = record or Record()
        self.first_epoch = first_epoch
        self.workers: dict[str, Worker] = {}
        self.lost: dict[str, RegisterRequest] = {}
        """Lost workers, for display."""
        self.gateways: dict[str, Gateway] = {}
        self.beliefs = Beliefs()
        self.late_s = 0.0
        """How late this process has recently run, in seconds."""
        self.last_tick = now
        self.share_limit = UNLIMITED
        """The most pipelines that can share pages, after a larger number failed."""
        self.pages: dict[tuple[str, int], int] = {}
        """(worker, incarnation) -> its KV pages per gateway, for all pipelines together."""
        self.counts_before: tuple[int, ...] | None = None
        """The layer counts to return to if `record.counts` fail."""
        self.load_failures = 0
        """How often a worker failed to load wanted ranges. A final failure counts as enough to give up."""
        self.cannot_load = ""
        """Why a worker last failed to load wanted ranges."""
        self.given_up = ""
        """Why an operator's last request was given up."""
        self.stale_refused: dict[str, dict[str, int]] = {}
        """Worker -> kind of order -> number of stale orders that it has refused since it started."""
        self.advices: list[str] = []
        """Sentences for operators on what would make the pipelines faster."""
        self.looked_at = 0.0
        """Clock time of the last look at the measured steps."""
        self.departed: list[str] = []
        """Addresses of workers that are gone. Their connections will be closed."""
        self.said: list[tuple[str, bool]] = []
        """Lines for the log, each with whether it is a warning."""
        self.news: bool | None = None
        """Whether watchers must be told of a change: at once (True), with a delay (False), or not at all (None)."""
        self.version = 0
        """Rises with every change that policies could respond to."""
        self._memo: dict[object, object] = {}
        self._memo_version = -1
        stored = self.record.plans
        self.had_pipelines = bool(stored)
        """Whether there were pipelines before a restart."""
        self.settled_at = now + timing.lease_s + timing.reconnect_s
        """Clock time until which to wait for workers from before a restart."""
        self.gateways_came_at = now + timing.gone_s if self.record.epochs else now
        """Clock time by which gateways of an earlier coordinator have come back. It is not known which there were."""
        self.pipelines = {
            name: Pipeline(name, self.record.epochs.get(name, 0)) for name in sorted(stored or ("pipeline-0",))
        }
        for name, plan in stored.items():
            # A later epoch may have begun beside this plan. If one replaced it, the workers will not report this plan.
            if plan.epoch <= self.pipelines[name].epoch and plan.terms == target.terms:
                self.pipelines[name].restored = plan
                self.pipelines[name].reason = "the coordinator restarted and waits for the workers to report"

    # -- what is wanted ---------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """The target with the layer counts that are wanted now."""
        counts = self.record.counts
        return self.settings if counts is None else replace(self.settings, layer_partition=counts)

    @property
    def wanted_ranges(self) -> tuple[Range, ...] | None:
        """The wanted ranges, while a pipeline with all stages serves with other ranges. Else None."""
        if self.record.counts is None:
            return None
        ranges = tuple(itertools.pairwise(itertools.accumulate(self.record.counts, initial=0)))
        whole = [a for p in self.kept if (a := p.serving) is not None and len(a.stages) == len(ranges)]
        return ranges if any(a.ranges != ranges for a in whole) else None

    def drains(self, worker: Worker) -> bool:
        """Whether the worker drains, so that it gets no stage."""
        return self.record.drains.get(worker.worker_id) == worker.incarnation

    def log(self, message: str, *, warning: bool = False) -> None:
        """Adds a line for the log."""
        self.said.append((message, warning))

    # -- time and restarts ------------------------------------------------------------------------------------------

    @property
    def restoring(self) -> bool:
        """Whether a pipeline from before a restart may still turn out to be active."""
        return any(pipeline.restored for pipeline in self.pipelines.values())

    def settles(self, now: float) -> bool:
        """Whether workers from before a restart may still come back."""
        return now < self.settled_at

    def changed(self) -> None:
        """Notes a change that policies could respond to."""
        self.version += 1

    def publish(self, *, urgent: bool = True) -> None:
        """Notes a change that watchers must be told of. Policies respond to it only if it is urgent."""
        self.news = bool(self.news) or urgent
        self.version += urgent

    def membership_changed(self) -> None:
        """Notes that workers or serving pipelines changed. Moves that were given up may be tried again."""
        self.publish()
        for pipeline in self.pipelines.values():
            if pipeline.gave_up is not None and pipeline.gave_up.policy != "ranges":
                pipeline.gave_up = None

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """Caches a pure computation on the world, or the CannotForm that it raises, for one version of the world."""
        if self._memo_version != self.version:
            self._memo.clear()
            self._memo_version = self.version
        if key not in self._memo:
            try:
                self._memo[key] = compute()
            except CannotForm as e:
                self._memo[key] = e
        found = self._memo[key]
        if isinstance(found, CannotForm):
            raise found.with_traceback(None)
        return found  # type: ignore[return-value]

    # -- workers ----------------------------------------------------------------------------------------------------

    def knows(self, worker_id: str, incarnation: int) -> bool:
        """Whether this incarnation of the worker is registered."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.incarnation == incarnation

    def stages_of(self, worker_id: str) -> list[tuple[Attempt, int]]:
        """The attempts that a worker is part of, each with the worker's stage in it."""
        attempts = (attempt for pipeline in self.pipelines.values() for attempt in pipeline.attempts)
        return [(a, plan.stage) for a in attempts for plan in a.stages if plan.worker_id == worker_id]

    def worker_at(self, attempt: Attempt, stage: int) -> Worker:
        """The worker that holds a stage of an attempt."""
        return self.workers[attempt.stages[stage].worker_id]

    def members(self, attempt: Attempt) -> list[RegisterRequest]:
        """The registrations of an attempt's workers, in stage order."""
        return [self.worker_at(attempt, plan.stage).info for plan in attempt.stages]

    @property
    def staying(self) -> list[Worker]:
        """Workers that do not drain."""
        return [worker for worker in self.workers.values() if not self.drains(worker)]

    def used(self, beside: Pipeline | None = None) -> set[str]:
        """Workers that pipelines other than `beside` use or will use after their move."""
        others = (p for p in self.pipelines.values() if p is not beside)
        return {name for p in others for attempt in p.attempts for name in attempt.workers}

    def spare(self) -> list[Worker]:
        """Workers that do not drain and that no pipeline uses or will use."""
        used = self.used()
        return [w for w in self.staying if w.worker_id not in used]

    def candidates(self, workers: Iterable[Worker]) -> list[Candidate]:
        """The workers as candidates for placement."""
        listed = list(workers)
        return [
            Candidate(w.worker_id, w.pool, kind, w.kept, w.any_stage, dict(w.refusals), w.unfit)
            for w, kind in zip(listed, kinds([w.info for w in listed]), strict=True)
        ]

    def ucx_failure(self, sender: RegisterRequest, receiver: RegisterRequest) -> str:
        """Why UCX between two workers is no longer tried. Empty if it still is."""
        failures = self.beliefs.ucx_failed.get(frozenset((sender.incarnation, receiver.incarnation)), [])
        return failures[-1] if len(failures) > 1 else ""

    # -- pipelines --------------------------------------------------------------------------------------------------

    def attempt(self, pipeline_id: str, epoch: int) -> Attempt | None:
        """The pipeline's attempt at this epoch, if there is one."""
        pipeline = self.pipelines.get(pipeline_id)
        attempts = pipeline.attempts if pipeline is not None else []
        return next((attempt for attempt in attempts if attempt.epoch == epoch), None)

    @property
    def kept(self) -> list[Pipeline]:
        """Pipelines that are not leaving."""
        return [p for p in self.pipelines.values() if not p.leaving]

    def is_short(self, pipeline: Pipeline) -> bool:
        """Whether the pipeline has fewer stages than it should (policy/takeover.py)."""
        return 0 < len(pipeline.stages) < self.settings.num_stages

    @property
    def num_shares(self) -> int:
        """Number of pipelines that should share each worker's pages. One with too few stages shares with none."""
        short = any(self.is_short(p) for p in self.pipelines.values())
        return 1 if short else len(self.pipelines)

    def pipelines_of(self, worker_id: str) -> list[str]:
        """Pipelines whose main attempt uses a worker."""
        return [p.pipeline_id for p in self.pipelines.values() if p.stage_of(worker_id) is not None]

    # -- gateways ---------------------------------------------------------------------------------------------------

    def watching(self, now: float) -> set[str]:
        """Gateways that may drive pipelines."""
        return {n for n, g in self.gateways.items() if g.streams or now < g.gone_at + self.timing.gone_s}

    def without_moves(self, now: float) -> list[str]:
        """Workers and gateways of an older release, in which pipelines neither move nor share stages."""
        workers = [w.worker_id for w in self.workers.values() if w.info.protocol < MOVES]
        return workers + sorted(n for n in self.watching(now) if not self.gateways[n].knows_moves)

    def stored(self, main: Attempt, move: Attempt | None) -> StoredPlan:
        """What is stored of a pipeline that serves as `main`."""
        plan = self._stored(main)
        return replace(plan, next=self._stored(move)) if move is not None and move.phase is Phase.SWITCH else plan

    def _stored(self, attempt: Attempt) -> StoredPlan:
        stages = range(len(attempt.stages))
        return StoredPlan(
            attempt.pipeline_id,
            attempt.epoch,
            attempt.stages,
            tuple(attempt.loaded[s] for s in stages),
            tuple(attempt.routes.get(s, "") for s in stages),
            self.settings.terms,
            attempt.shares,
        )
