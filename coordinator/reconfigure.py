"""The coordinator's core: a state machine of membership and pipelines. Events in, actions out; no I/O, no clock.

    DOWN --all stages have a worker--> FORMING (assign -> link -> activate) --every ack--> SERVING --drain--> DRAINING
      ^                                   |  ^--------------- a worker, link or order fails ---------|-----------|
      |---- a stage has no worker --------|

Every attempt to form a pipeline has an epoch of its own, higher than any before, written down before anyone hears of
it. Events carry the epoch they belong to; those of an epoch that has passed change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from . import values as v
from .planning import CannotForm, Choice, Target, choose, transport

RETRY_MIN_S, RETRY_MAX_S = 0.2, 2.0
# After a restart: one lease, and the longest that a worker's channel may wait before it connects again.
RECONNECT_S = 1.2
# A core that was not run for so long (a stopped process, a suspended machine) has heard no renewals.
STALL_S = 0.3
LOST_SHOWN = 64


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
    tried: int = -1
    """Membership version at which forming was last tried in vain."""
    restored: v.StoredPlan | None = None
    """A plan from before a restart whose workers may still be active."""

    def stage_of(self, worker_id: str) -> int | None:
        """The stage that a worker holds."""
        return next((plan.stage for plan in self.stages if plan.worker_id == worker_id), None)


class Mesh:
    """Membership and pipelines."""

    def __init__(
        self,
        target: Target,
        *,
        now: float,
        nonce: Callable[[], int],
        lease_s: float = 0.6,
        pipeline_ids: Sequence[str] = ("pipeline-0",),
        epochs: Mapping[str, int] | None = None,
        plans: Mapping[str, v.StoredPlan] | None = None,
    ) -> None:
        self.target = target
        self.lease_s = lease_s
        self.workers: dict[str, v.Worker] = {}
        self.lost: dict[str, v.WorkerInfo] = {}
        self.pipelines = {name: Pipeline(name, (epochs or {}).get(name, 0)) for name in pipeline_ids}
        self._nonce = nonce
        self._now = self._last_tick = now
        self._actions: list[v.Action] = []
        self._version = 0  # of the membership
        self._ucx_failed: dict[tuple[int, int], list[str]] = {}  # incarnations of a link's ends -> errors
        self._restore_until = now + lease_s + RECONNECT_S
        for name, plan in (plans or {}).items():
            pipeline = self.pipelines.get(name)
            if pipeline and plan.epoch == pipeline.epoch and plan.terms == target.terms:
                pipeline.restored = plan
                pipeline.reason = "the coordinator restarted and waits for the workers to report"

    @property
    def restoring(self) -> bool:
        """Whether a pipeline from before a restart may still turn out to be active."""
        return any(pipeline.restored for pipeline in self.pipelines.values())

    def knows(self, worker_id: str, incarnation: int) -> bool:
        """Whether this life of the worker is a member."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.info.incarnation == incarnation

    def pipelines_of(self, worker_id: str) -> list[str]:
        """Pipelines that use a worker."""
        return [p.pipeline_id for p in self.pipelines.values() if p.stage_of(worker_id) is not None]

    def handle(self, event: v.Event, now: float) -> list[v.Action]:
        """Takes one event at clock time `now` (seconds, monotonic); returns what is to be done, in order."""
        self._now, self._actions = max(now, self._now), []
        match event:
            case v.Tick():
                self._tick()
            case v.WorkerRegistered(info):
                self._register(info)
            case v.LeaseRenewed(worker_id, incarnation):
                if self.knows(worker_id, incarnation):
                    self.workers[worker_id].deadline = self._now + self.lease_s
            case v.WorkerLost(worker_id, incarnation, reason):
                if self.knows(worker_id, incarnation):
                    self._lose(worker_id, reason)
            case v.DrainRequested(worker_id):
                self._drain(worker_id)
            case v.LinkBroken():
                self._link_broken(event)
            case _:
                self._order_answered(event)
        for pipeline in self.pipelines.values():
            self._form_if_due(pipeline)
        return self._actions

    # Membership

    def _tick(self) -> None:
        stalled = self._now - self._last_tick
        self._last_tick = self._now
        if stalled > STALL_S:
            for worker in self.workers.values():
                worker.deadline += stalled
        for worker_id in [name for name, worker in self.workers.items() if worker.deadline <= self._now]:
            self._lose(worker_id, f"its lease of {self.lease_s * 1000:.0f} ms ran out")
        if self.restoring and self._now >= self._restore_until:
            for pipeline in self.pipelines.values():
                if pipeline.restored:
                    self._give_up_restoring(pipeline, "not all of its workers reported in time")

    def _register(self, info: v.WorkerInfo) -> None:
        known = self.workers.get(info.worker_id)
        if known is not None and known.info.incarnation == info.incarnation:
            known.info, known.deadline = info, self._now + self.lease_s
        else:
            if known is not None:
                self._lose(info.worker_id, "a new incarnation of it registered")
            self.workers[info.worker_id] = v.Worker(info, self._now + self.lease_s)
            self.lost.pop(info.worker_id, None)
            self._log(
                f"worker {info.worker_id} registered: {info.address}, "
                f"{'any stage' if info.pool < 0 else f'stage {info.pool}'}, {info.tp_size} rank(s), {info.device_kind}"
            )
        self._version += 1
        self._hear_held(self.workers[info.worker_id])
        self._publish()

    def _hear_held(self, worker: v.Worker) -> None:
        """Takes up what a worker says it holds: epochs this core may have forgotten, weights, active pipelines."""
        info = worker.info
        for held in sorted(info.held, key=lambda h: h.epoch):
            if held.fingerprint == self.target.fingerprint:
                worker.kept = held.layers
        for pipeline in self.pipelines.values():
            held_epoch = max((h.epoch for h in info.held if h.pipeline_id == pipeline.pipeline_id), default=0)
            if held_epoch > pipeline.epoch:
                pipeline.restored = None
                pipeline.epoch = held_epoch
                self._act(v.PersistEpoch(pipeline.pipeline_id, held_epoch))
                self._interrupt(pipeline, f"worker {info.worker_id} knows the later epoch {held_epoch}")
            stage = pipeline.stage_of(info.worker_id)
            if stage is not None and pipeline.state in (State.SERVING, State.DRAINING):
                if not self._holds(info, pipeline.pipeline_id, pipeline.epoch, pipeline.stages[stage]):
                    self._interrupt(pipeline, f"stage {stage}: worker {info.worker_id} no longer holds it")
            elif pipeline.restored:
                self._try_adopt(pipeline)
            if pipeline.restored is None:
                self._release_stale(pipeline, worker)

    def _release_stale(self, pipeline: Pipeline, worker: v.Worker) -> None:
        for held in worker.info.held:
            current = held.epoch == pipeline.epoch and pipeline.stage_of(worker.info.worker_id) is not None
            if held.pipeline_id == pipeline.pipeline_id and not current:
                self._release(pipeline, held.epoch, worker.info, "its epoch has passed")

    @staticmethod
    def _holds(info: v.WorkerInfo, pipeline_id: str, epoch: int, plan: v.StagePlan) -> bool:
        wanted = (pipeline_id, epoch, plan.stage, plan.layers, plan.generation, True)
        return any((h.pipeline_id, h.epoch, h.stage, h.layers, h.generation, h.active) == wanted for h in info.held)

    def _lose(self, worker_id: str, reason: str) -> None:
        worker = self.workers.pop(worker_id)
        self.lost[worker_id] = worker.info
        while len(self.lost) > LOST_SHOWN:
            self.lost.pop(next(iter(self.lost)))
        self._version += 1
        self._log(f"worker {worker_id} is lost: {reason}", warning=True)
        for pipeline in self.pipelines.values():
            stage = pipeline.stage_of(worker_id)
            if stage is not None:
                self._interrupt(pipeline, f"stage {stage}: worker {worker_id} is lost: {reason}")
        self._publish()

    def _drain(self, worker_id: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.draining:
            return
        worker.draining = True
        self._version += 1
        self._log(f"worker {worker_id} drains")
        for pipeline in self.pipelines.values():
            stage = pipeline.stage_of(worker_id)
            if stage is None:
                continue
            if pipeline.state is State.SERVING:
                pipeline.state, pipeline.reason = State.DRAINING, f"stage {stage}: worker {worker_id} drains"
            elif pipeline.state is State.FORMING:
                self._interrupt(pipeline, f"stage {stage}: worker {worker_id} drains")
        self._publish()

    # After a restart

    def _try_adopt(self, pipeline: Pipeline) -> None:
        """Takes a pipeline of before the restart over as it is, once every one of its workers reports it active."""
        plan = pipeline.restored
        assert plan is not None
        for stage in plan.stages:
            worker = self.workers.get(stage.worker_id)
            if worker is None:
                return
            same_life = worker.info.incarnation == stage.incarnation
            if not same_life or not self._holds(worker.info, pipeline.pipeline_id, plan.epoch, stage):
                self._give_up_restoring(pipeline, f"worker {stage.worker_id} no longer holds stage {stage.stage}")
                return
        pipeline.restored = None
        pipeline.stages = pipeline.last_stages = plan.stages
        pipeline.loaded, pipeline.routes = dict(enumerate(plan.loaded)), dict(enumerate(plan.routes))
        pipeline.acked = {stage.stage for stage in plan.stages}
        pipeline.state, pipeline.phase, pipeline.reason = State.SERVING, Phase.IDLE, ""
        self._log(f"{pipeline.pipeline_id} goes on at epoch {pipeline.epoch}: all of its workers are still active")
        self._publish()

    def _give_up_restoring(self, pipeline: Pipeline, why: str) -> None:
        assert pipeline.restored is not None
        pipeline.last_stages, pipeline.restored = pipeline.restored.stages, None
        self._log(f"{pipeline.pipeline_id} is formed anew: {why}")
        pipeline.reason = why
        for worker in self.workers.values():
            self._release_stale(pipeline, worker)
        self._publish()

    # Forming

    def _form_if_due(self, pipeline: Pipeline) -> None:
        if pipeline.restored or pipeline.state in (State.SERVING, State.DRAINING):
            return
        if pipeline.state is State.DOWN and pipeline.tried == self._version:
            return
        if pipeline.state is State.FORMING and (pipeline.phase is not Phase.RETRY or self._now < pipeline.retry_at):
            return
        busy = {s.worker_id for other in self.pipelines.values() if other is not pipeline for s in other.stages}
        free = [w for name, w in self.workers.items() if not w.draining and name not in busy]
        try:
            chosen = choose(self.target, free, pipeline.last_stages)
        except CannotForm as e:
            self._down(pipeline, str(e))
            return
        self._assign(pipeline, chosen)

    def _assign(self, pipeline: Pipeline, chosen: Sequence[Choice]) -> None:
        names = {choice.worker.info.worker_id for choice in chosen}
        self._new_epoch(pipeline, keep=names, reason="another worker took its place")
        pipeline.stages = pipeline.last_stages = tuple(
            v.StagePlan(stage, c.worker.info.worker_id, c.worker.info.incarnation, c.layers, self._nonce())
            for stage, c in enumerate(chosen)
        )
        pipeline.state, pipeline.phase, pipeline.reason = State.FORMING, Phase.ASSIGN, Phase.ASSIGN.value
        shown = ", ".join(f"{c.worker.info.worker_id}: layers {c.layers[0]}-{c.layers[1] - 1}" for c in chosen)
        self._log(f"{pipeline.pipeline_id} forms at epoch {pipeline.epoch}: {shown}")
        for plan, choice in zip(pipeline.stages, chosen, strict=True):
            choice.worker.progress = v.Progress()
            if choice.worker.kept != plan.layers:
                choice.worker.kept = None
            self._act(v.Assign(pipeline.pipeline_id, pipeline.epoch, len(chosen), plan, choice.worker.info.address))
        self._publish()

    def _order_answered(self, event: v.AssignProgress | v.AssignDone | v.LinkUp | v.Activated | v.StepFailed) -> None:
        pipeline = self.pipelines.get(event.pipeline_id)
        if pipeline is None or pipeline.epoch != event.epoch or pipeline.state is not State.FORMING:
            return
        match event:
            case v.AssignProgress() if pipeline.phase is Phase.ASSIGN:
                self._worker_at(pipeline, event.stage).progress = v.Progress(event.loaded_bytes, event.total_bytes)
                self._act(v.Publish(urgent=False))
            case v.AssignDone() if pipeline.phase is Phase.ASSIGN:
                self._assign_done(pipeline, event.stage, event.loaded)
            case v.LinkUp() if pipeline.phase is Phase.LINK:
                pipeline.routes[event.stage] = event.route
                if len(pipeline.routes) == len(pipeline.stages) - 1:
                    self._activate(pipeline)
            case v.Activated() if pipeline.phase is Phase.ACTIVATE:
                pipeline.acked.add(event.stage)
                if len(pipeline.acked) == len(pipeline.stages):
                    self._serve(pipeline)
            case v.StepFailed() if pipeline.phase is not Phase.RETRY:
                self._step_failed(pipeline, event)

    def _assign_done(self, pipeline: Pipeline, stage: int, loaded: v.Loaded) -> None:
        worker, layers = self._worker_at(pipeline, stage), pipeline.stages[stage].layers
        worker.kept = layers
        refusal = self._why_refused(pipeline, worker.info.worker_id, loaded)
        if refusal:
            self._refuse(pipeline, stage, refusal)
            return
        worker.progress.loaded_bytes = worker.progress.total_bytes
        pipeline.loaded[stage] = loaded
        if len(pipeline.loaded) < len(pipeline.stages):
            self._act(v.Publish(urgent=False))
            return
        pipeline.phase, pipeline.reason = Phase.LINK, Phase.LINK.value
        try:
            links = [self._link(pipeline, stage) for stage in range(len(pipeline.stages) - 1)]
        except CannotForm as e:
            self._down(pipeline, str(e))
            return
        self._actions.extend(links)
        if not links:
            self._activate(pipeline)
        self._publish()

    def _why_refused(self, pipeline: Pipeline, worker_id: str, loaded: v.Loaded) -> str:
        target = self.target
        if loaded.fingerprint != target.fingerprint:
            agree = [pipeline.stages[stage].worker_id for stage in sorted(pipeline.loaded)]
            others = f" and {', '.join(agree)}" if agree else ""
            return (
                f"worker {worker_id} read revision {loaded.fingerprint[:12] or '(none)'} of the checkpoint, the "
                f"coordinator{others} have {target.fingerprint[:12]}: give all of them the same files"
            )
        need, have, page = target.limits.pages_per_sequence, loaded.num_pages, target.limits.page_size
        if have < need:
            return (
                f"{have} KV pages of {page} tokens; one sequence of --max-model-len {target.limits.max_model_len} "
                f"needs {need}: use --max-model-len {have * page}, more KV memory (--kv-cache-gib), or more stages"
            )
        return ""

    def _link(self, pipeline: Pipeline, stage: int) -> v.MakeLink:
        sender, receiver = (self._worker_at(pipeline, s).info for s in (stage, stage + 1))
        failures = self._ucx_failed.get((sender.incarnation, receiver.incarnation), [])
        ucx_failed = failures[-1] if len(failures) > 1 else ""
        name, warning = transport(self.target.transport, sender, receiver, ucx_failed=ucx_failed)
        if warning:
            self._log(warning, warning=True)
        return v.MakeLink(
            pipeline.pipeline_id,
            pipeline.epoch,
            stage,
            name,
            sender.address,
            receiver.address,
            receiver.worker_id,
            sender.addresses(name) or (),
            tuple(self._nonce() for _ in range(receiver.tp_size)),
        )

    def _activate(self, pipeline: Pipeline) -> None:
        pipeline.phase, pipeline.reason = Phase.ACTIVATE, Phase.ACTIVATE.value
        for plan in pipeline.stages:
            address = self._worker_at(pipeline, plan.stage).info.address
            self._act(v.Activate(pipeline.pipeline_id, pipeline.epoch, plan.stage, address))

    def _serve(self, pipeline: Pipeline) -> None:
        pipeline.state, pipeline.phase, pipeline.reason, pipeline.failures = State.SERVING, Phase.IDLE, "", 0
        stages = range(len(pipeline.stages))
        plan = v.StoredPlan(
            pipeline.pipeline_id,
            pipeline.epoch,
            pipeline.stages,
            tuple(pipeline.loaded[s] for s in stages),
            tuple(pipeline.routes.get(s, "") for s in stages),
            self.target.terms,
        )
        self._act(v.PersistPlan(plan))
        self._log(f"{pipeline.pipeline_id} serves at epoch {pipeline.epoch}")
        self._publish()

    # Failing

    def _step_failed(self, pipeline: Pipeline, event: v.StepFailed) -> None:
        reason = f"stage {event.stage}: {event.reason}"
        if event.what == "link" and event.transport_failed:
            ends = tuple(pipeline.stages[s].incarnation for s in (event.stage, event.stage + 1))
            self._ucx_failed.setdefault((ends[0], ends[1]), []).append(event.reason)
        if event.final:
            self._refuse(pipeline, event.stage, event.reason)
            return
        pipeline.failures += 1
        delay = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(pipeline.failures - 1, 10))
        self._interrupt(pipeline, reason, delay)

    def _refuse(self, pipeline: Pipeline, stage: int, reason: str) -> None:
        """What failed would fail again: this life of the worker is not asked for the same once more."""
        worker = self._worker_at(pipeline, stage)
        worker.refusals[stage, pipeline.stages[stage].layers] = reason
        self._version += 1
        self._interrupt(pipeline, f"stage {stage}: {reason}")

    def _link_broken(self, event: v.LinkBroken) -> None:
        pipeline = self.pipelines.get(event.pipeline_id)
        if pipeline is None or pipeline.epoch != event.epoch or pipeline.state is State.DOWN:
            return
        stage = pipeline.stage_of(event.worker_id)
        if stage is not None and pipeline.phase is not Phase.RETRY:
            # The neighbour's death breaks a link before its own stream breaks: wait for that, so that it is replaced.
            self._interrupt(pipeline, f"stage {stage}: a link broke: {event.reason}", RETRY_MIN_S)

    def _interrupt(self, pipeline: Pipeline, reason: str, delay_s: float = 0.0) -> None:
        """The attempt, or the pipeline that served, is over; the next attempt comes after `delay_s`."""
        if pipeline.state is State.DOWN:
            return
        pipeline.state, pipeline.phase, pipeline.reason = State.FORMING, Phase.RETRY, reason
        pipeline.retry_at = self._now + delay_s
        self._act(v.Forget(pipeline.pipeline_id, pipeline.epoch + 1))
        self._log(f"{pipeline.pipeline_id} epoch {pipeline.epoch} is over: {reason}", warning=True)
        self._publish()

    def _down(self, pipeline: Pipeline, reason: str) -> None:
        pipeline.tried = self._version
        if pipeline.state is State.DOWN and pipeline.reason == reason:
            return
        if pipeline.state is not State.DOWN:
            if pipeline.phase is Phase.RETRY and pipeline.reason not in reason:
                reason = f"{pipeline.reason}; {reason}"
            self._new_epoch(pipeline, keep=set(), reason=reason)
            pipeline.stages = ()
        pipeline.state, pipeline.phase, pipeline.reason = State.DOWN, Phase.IDLE, reason
        self._log(f"{pipeline.pipeline_id} is down: {reason}", warning=True)
        self._publish()

    def _new_epoch(self, pipeline: Pipeline, keep: set[str], reason: str) -> None:
        """Raises the epoch; members of the old attempt outside `keep` are released."""
        old, members = pipeline.epoch, pipeline.stages
        pipeline.epoch += 1
        pipeline.loaded, pipeline.routes, pipeline.acked = {}, {}, set()
        self._act(v.PersistEpoch(pipeline.pipeline_id, pipeline.epoch))
        self._act(v.Forget(pipeline.pipeline_id, pipeline.epoch))
        for plan in members:
            if plan.worker_id not in keep and self.knows(plan.worker_id, plan.incarnation):
                self._release(pipeline, old, self.workers[plan.worker_id].info, reason)

    # Small words

    def _worker_at(self, pipeline: Pipeline, stage: int) -> v.Worker:
        return self.workers[pipeline.stages[stage].worker_id]

    def _release(self, pipeline: Pipeline, epoch: int, info: v.WorkerInfo, reason: str) -> None:
        self._act(v.Release(pipeline.pipeline_id, epoch, info.worker_id, info.address, reason))

    def _act(self, action: v.Action) -> None:
        self._actions.append(action)

    def _publish(self) -> None:
        self._act(v.Publish())

    def _log(self, message: str, *, warning: bool = False) -> None:
        self._act(v.Log(message, warning))
