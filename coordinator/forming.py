"""Forms, activates and takes down pipelines: the part of the core that answers to workers' answers.

    DOWN --all stages have a worker--> FORMING (assign -> link -> activate) --every ack--> SERVING --drain--> DRAINING
      ^                                   |  ^--------------- a worker, link or order fails ---------|-----------|
      |---- a stage has no worker --------|

Every attempt to form a pipeline has an epoch of its own, higher than any before, written down before anyone hears of
it. Events carry the epoch they belong to; those of an epoch that has passed change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from . import actions, events
from . import values as v
from .pipeline import Phase, Pipeline, State, num_links
from .planning import CannotForm, Choice, Target, choose_apart, transport

RETRY_MIN_S, RETRY_MAX_S = 0.2, 2.0
# A pipeline that served this long was sound: what breaks it is a new failure, not the last one again.
SOUND_S = 10.0
# For so long after a link failed to come up its two workers are not made neighbours, if there are others.
APART_S = 30.0
# For so long a worker is not asked for what it could not do: a file system that was away, or memory, may be back then.
REFUSED_S = 60.0


class Former:
    """Pipelines, and the workers they are made of."""

    def __init__(
        self,
        target: Target,
        *,
        now: float,
        nonce: Callable[[], int],
        pipeline_ids: Sequence[str] = ("pipeline-0",),
        epochs: Mapping[str, int] | None = None,
        first_epoch: int = 1,
    ) -> None:
        self.target = target
        self._first_epoch = first_epoch
        self.workers: dict[str, v.Worker] = {}
        self.pipelines = {name: Pipeline(name, (epochs or {}).get(name, 0)) for name in pipeline_ids}
        self._nonce = nonce
        self._now = now
        self._actions: list[actions.Action] = []
        self._version = 0  # of the membership
        self._ucx_failed: dict[frozenset[int], list[str]] = {}  # incarnations of a link's ends -> errors
        self._apart: dict[frozenset[str], float] = {}  # workers that do not reach each other -> believed until
        self._away: dict[str, float] = {}  # workers that a gateway does not reach -> believed until

    def knows(self, worker_id: str, incarnation: int) -> bool:
        """Whether this life of the worker is a member."""
        worker = self.workers.get(worker_id)
        return worker is not None and worker.info.incarnation == incarnation

    def pipelines_of(self, worker_id: str) -> list[str]:
        """Pipelines that use a worker."""
        return [p.pipeline_id for p in self.pipelines.values() if p.stage_of(worker_id) is not None]

    def _form_if_due(self, pipeline: Pipeline) -> None:
        if pipeline.restored or pipeline.state in (State.SERVING, State.DRAINING):
            return
        if pipeline.state is State.DOWN and pipeline.tried == self._version:
            return
        if pipeline.state is State.FORMING and (pipeline.phase is not Phase.RETRY or self._now < pipeline.retry_at):
            return
        try:
            chosen = self._choose(pipeline, pipeline.last_stages)
        except CannotForm as e:
            self._down(pipeline, str(e), final=e.final)
            return
        self._assign(pipeline, chosen)

    def _choose(self, pipeline: Pipeline, previous: Sequence[v.StagePlan]) -> list[Choice]:
        """Who is to hold what; `previous` stages keep their worker and layers where they can. Raises CannotForm."""
        # Also where layers move, what was believed for a while is not believed for ever.
        self._apart = {pair: until for pair, until in self._apart.items() if until > self._now}
        self._away = {name: until for name, until in self._away.items() if until > self._now}
        return choose_apart(self.target, self._free_for(pipeline), previous, self._apart.keys(), self._away.keys())

    def _num_shares(self) -> int:
        """Pipelines between which pages are to be split."""
        return 1

    def _free_for(self, pipeline: Pipeline) -> list[v.Worker]:
        """Workers that the pipeline may be made of."""
        busy = self._busy(pipeline)
        return [w for name, w in self.workers.items() if not w.draining and name not in busy]

    def _busy(self, pipeline: Pipeline) -> set[str]:
        """Workers that other pipelines use."""
        return {s.worker_id for other in self.pipelines.values() if other is not pipeline for s in other.stages}

    def _assign(self, pipeline: Pipeline, chosen: Sequence[Choice]) -> None:
        names = {choice.worker.info.worker_id for choice in chosen}
        self._new_epoch(pipeline, keep=names, reason="another worker took its place")
        pipeline.stages = pipeline.last_stages = tuple(
            v.StagePlan(stage, c.worker.info.worker_id, c.worker.info.incarnation, c.layers, self._nonce())
            for stage, c in enumerate(chosen)
        )
        pipeline.state, pipeline.phase, pipeline.reason = State.FORMING, Phase.ASSIGN, Phase.ASSIGN.value
        pipeline.shares = self._num_shares()
        shown = ", ".join(f"{c.worker.info.worker_id}: layers {c.layers[0]}-{c.layers[1] - 1}" for c in chosen)
        self._log(f"{pipeline.pipeline_id} forms at epoch {pipeline.epoch}: {shown}")
        for plan, choice in zip(pipeline.stages, chosen, strict=True):
            choice.worker.progress, choice.worker.preparing = v.Progress(), None
            choice.worker.beside = None
            if choice.worker.kept != plan.layers:
                choice.worker.kept = None
            address = choice.worker.info.address
            self._act(actions.Assign(pipeline.pipeline_id, pipeline.epoch, len(chosen), plan, address, pipeline.shares))
        self._publish()

    def _order_answered(
        self, event: events.AssignProgress | events.AssignDone | events.LinkUp | events.Activated | events.StepFailed
    ) -> None:
        pipeline = self._at(event.pipeline_id, event.epoch)
        if pipeline is None or pipeline.state is not State.FORMING:
            return
        match event:
            case events.AssignProgress() if pipeline.phase is Phase.ASSIGN:
                self._worker_at(pipeline, event.stage).progress = v.Progress(event.loaded_bytes, event.total_bytes)
                self._act(actions.Publish(urgent=False))
            case events.AssignDone() if pipeline.phase is Phase.ASSIGN:
                self._assign_done(pipeline, event.stage, event.loaded)
            case events.LinkUp() if pipeline.phase is Phase.LINK:
                self._link_up(pipeline, event)
            case events.Activated() if pipeline.phase is Phase.ACTIVATE:
                pipeline.acked.add(event.stage)
                if len(pipeline.acked) == len(pipeline.stages):
                    self._serve(pipeline)
            case events.StepFailed() if pipeline.phase is not Phase.RETRY:
                self._step_failed(pipeline, event)

    def _assign_done(self, pipeline: Pipeline, stage: int, loaded: v.Loaded) -> None:
        worker, layers = self._worker_at(pipeline, stage), pipeline.stages[stage].layers
        worker.kept = layers
        refusal = self._why_refused(pipeline, loaded)
        if refusal:
            self._refuse(pipeline, stage, refusal)
            return
        worker.progress.loaded_bytes = worker.progress.total_bytes
        pipeline.loaded[stage] = loaded
        if len(pipeline.loaded) < len(pipeline.stages):
            self._act(actions.Publish(urgent=False))
            return
        pipeline.phase, pipeline.reason = Phase.LINK, Phase.LINK.value
        try:
            links = self._links(pipeline)
        except CannotForm as e:
            self._down(pipeline, str(e), final=e.final)
            return
        self._actions.extend(links)
        if not links:
            self._activate(pipeline)
        self._publish()

    def _why_refused(self, pipeline: Pipeline, loaded: v.Loaded) -> str:
        target = self.target
        if loaded.fingerprint != target.fingerprint:
            agree = [pipeline.stages[stage].worker_id for stage in sorted(pipeline.loaded)]
            others = f"the coordinator and {', '.join(agree)} have" if agree else "the coordinator has"
            return (
                f"read revision {loaded.fingerprint[:12] or '(none)'} of the checkpoint, "
                f"{others} {target.fingerprint[:12]}: give all of them the same files"
            )
        need, have, page = target.limits.pages_per_sequence, loaded.num_pages, target.limits.page_size
        if have < need:
            return (
                f"has {have} KV pages of {page} tokens; one sequence of --max-model-len {target.limits.max_model_len} "
                f"needs {need}: use --max-model-len {have * page}, more KV memory (--kv-cache-gib), or more stages"
            )
        return ""

    def _links(self, pipeline: Pipeline) -> list[actions.MakeLink]:
        """One behind every stage: the last sends its tokens to the first. None where one stage is both."""
        return [self._link(pipeline, stage) for stage in range(num_links(pipeline))]

    def _link_up(self, pipeline: Pipeline, event: events.LinkUp) -> None:
        pipeline.routes[event.stage] = event.route
        if len(pipeline.routes) == num_links(pipeline):
            self._activate(pipeline)

    def _link(self, pipeline: Pipeline, stage: int) -> actions.MakeLink:
        to = (stage + 1) % len(pipeline.stages)
        sender, receiver = (self._worker_at(pipeline, s).info for s in (stage, to))
        name = self._transport(sender, receiver, quiet=to == 0)
        return actions.MakeLink(
            pipeline.pipeline_id,
            pipeline.epoch,
            stage,
            name,
            sender.address,
            receiver.address,
            receiver.worker_id,
            sender.addresses(name) or (),
            tuple(self._nonce() for _ in range(receiver.tp_size if to else 1)),
            to,
            tokens=to == 0,
        )

    def _transport(self, sender: v.WorkerInfo, receiver: v.WorkerInfo, *, quiet: bool) -> str:
        """Raises CannotForm. `quiet`: a warning was said of the same two already."""
        failures = self._ucx_failed.get(frozenset((sender.incarnation, receiver.incarnation)), [])
        ucx_failed = failures[-1] if len(failures) > 1 else ""
        name, warning = transport(self.target.transport, sender, receiver, ucx_failed=ucx_failed)
        if warning and not quiet:
            self._log(warning, warning=True)
        return name

    def _activate(self, pipeline: Pipeline) -> None:
        pipeline.phase, pipeline.reason = Phase.ACTIVATE, Phase.ACTIVATE.value
        for plan in pipeline.stages:
            address = self._worker_at(pipeline, plan.stage).info.address
            self._act(actions.Activate(pipeline.pipeline_id, pipeline.epoch, plan.stage, address))

    def _serve(self, pipeline: Pipeline) -> None:
        pipeline.state, pipeline.phase, pipeline.reason = State.SERVING, Phase.IDLE, ""
        pipeline.serving_since = self._now
        # Others may wait for what it has become.
        self._version += 1
        self._persist(pipeline)
        self._log(f"{pipeline.pipeline_id} serves at epoch {pipeline.epoch}")
        self._publish()

    def _persist(self, pipeline: Pipeline) -> None:
        """Writes down what serves."""
        self._act(actions.PersistPlan(self._stored(pipeline)))

    def _stored(self, pipeline: Pipeline) -> v.StoredPlan:
        stages = range(len(pipeline.stages))
        return v.StoredPlan(
            pipeline.pipeline_id,
            pipeline.epoch,
            pipeline.stages,
            tuple(pipeline.loaded[s] for s in stages),
            tuple(pipeline.routes.get(s, "") for s in stages),
            self.target.terms,
            pipeline.shares,
        )

    # Failing

    def _step_failed(self, pipeline: Pipeline, event: events.StepFailed) -> None:
        reason = f"stage {event.stage}: {event.reason}"
        if event.what == "link" and event.transport_failed:
            after = (event.stage + 1) % len(pipeline.stages)
            ends = frozenset(pipeline.stages[s].incarnation for s in (event.stage, after))
            self._ucx_failed.setdefault(ends, []).append(event.reason)
            names = frozenset(pipeline.stages[s].worker_id for s in (event.stage, after))
            self._apart[names] = self._now + APART_S
        if event.final:
            self._refuse(pipeline, event.stage, f"cannot {event.what}: {event.reason}")
            return
        self._interrupt(pipeline, reason, self._backoff_s(pipeline))

    def _refuse(self, pipeline: Pipeline, stage: int, reason: str) -> None:
        """What failed would fail again: the worker is not asked for the same soon."""
        worker = self._worker_at(pipeline, stage)
        reason = f"worker {worker.info.worker_id} {reason}"
        worker.refuse(stage, pipeline.stages[stage].layers, reason, self._now + REFUSED_S)
        self._version += 1
        self._interrupt(pipeline, f"stage {stage}: {reason}")

    def _link_broken(self, event: events.LinkBroken) -> None:
        pipeline = self._at(event.pipeline_id, event.epoch)
        if pipeline is None or pipeline.state is State.DOWN:
            return
        stage = pipeline.stage_of(event.worker_id)
        if stage is not None and pipeline.phase is not Phase.RETRY:
            # The neighbour's death breaks a link before its own stream breaks: wait for that, so that it is replaced.
            self._interrupt(pipeline, f"stage {stage}: a link broke: {event.reason}", self._backoff_s(pipeline))

    def _steps_stuck(self, event: events.StepsStuck) -> None:
        pipeline = self._at(event.pipeline_id, event.epoch)
        if pipeline is None or pipeline.state not in (State.SERVING, State.DRAINING):
            return
        reason = f"gateway {event.gateway_id}: {event.reason}"
        if event.unreachable and not self._does_without(pipeline, event.unreachable):
            self._log(f"{pipeline.pipeline_id} stays as it is, though {reason}", warning=True)
            return
        self._interrupt(pipeline, reason, self._backoff_s(pipeline))

    def _does_without(self, pipeline: Pipeline, unreachable: Collection[str]) -> bool:
        """Whether others can take the place of workers that a gateway does not reach; one that reaches none is itself
        cut off."""
        if len(pipeline.stages) > 1 and all(plan.worker_id in unreachable for plan in pipeline.stages):
            return False
        self._away |= dict.fromkeys(unreachable, self._now + APART_S)
        try:
            chosen = self._choose(pipeline, pipeline.stages)
        except CannotForm:
            return False
        return not any(choice.worker.info.worker_id in unreachable for choice in chosen)

    def _backoff_s(self, pipeline: Pipeline) -> float:
        """Counts a failure; how long to wait before the next attempt."""
        if pipeline.state is State.SERVING and self._now - pipeline.serving_since > SOUND_S:
            pipeline.failures = 0
        pipeline.failures += 1
        return min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(pipeline.failures - 1, 10))

    def _interrupt(self, pipeline: Pipeline, reason: str, delay_s: float = 0.0) -> None:
        """The attempt, or the pipeline that served, is over; the next attempt comes after `delay_s`."""
        if pipeline.state is State.DOWN:
            return
        pipeline.state, pipeline.phase, pipeline.reason = State.FORMING, Phase.RETRY, reason
        pipeline.retry_at = self._now + delay_s
        self._act(actions.Forget(pipeline.pipeline_id, pipeline.epoch + 1))
        self._log(f"{pipeline.pipeline_id} epoch {pipeline.epoch} is over: {reason}", warning=True)
        self._publish()

    def _down(self, pipeline: Pipeline, reason: str, *, final: bool) -> None:
        if pipeline.state is not State.DOWN:
            self._version += 1  # its workers are free for others
        pipeline.tried = self._version
        if pipeline.state is State.DOWN and pipeline.reason == reason:
            return
        was_up = pipeline.state is not State.DOWN
        if was_up:
            if pipeline.phase is Phase.RETRY and pipeline.reason not in reason:
                reason = f"{pipeline.reason}; {reason}"
            self._new_epoch(pipeline, keep=set(), reason=reason)
            pipeline.stages = ()
        pipeline.state, pipeline.phase, pipeline.reason, pipeline.final = State.DOWN, Phase.IDLE, reason, final
        self._log(f"{pipeline.pipeline_id} is down: {reason}", warning=was_up)
        self._publish()

    def _new_epoch(self, pipeline: Pipeline, keep: set[str], reason: str) -> None:
        """Raises the epoch; members of the old attempt outside `keep` are released."""
        old, members = pipeline.epoch, pipeline.stages
        pipeline.epoch = self._next_epoch(pipeline)
        pipeline.loaded, pipeline.routes, pipeline.acked = {}, {}, set()
        self._act(actions.PersistEpoch(pipeline.pipeline_id, pipeline.epoch))
        self._act(actions.Forget(pipeline.pipeline_id, pipeline.epoch))
        for plan in members:
            if plan.worker_id not in keep and self.knows(plan.worker_id, plan.incarnation):
                self._release(pipeline, old, self.workers[plan.worker_id].info, reason)

    # Small words

    def _at(self, pipeline_id: str, epoch: int) -> Pipeline | None:
        """The pipeline, if that is its epoch."""
        pipeline = self.pipelines.get(pipeline_id)
        return pipeline if pipeline is not None and pipeline.epoch == epoch else None

    def _next_epoch(self, pipeline: Pipeline) -> int:
        """One that it never had."""
        return max(pipeline.epoch + 1, self._first_epoch)

    def _worker_at(self, pipeline: Pipeline, stage: int) -> v.Worker:
        return self.workers[pipeline.stages[stage].worker_id]

    def _release(self, pipeline: Pipeline, epoch: int, info: v.WorkerInfo, reason: str, *, alone: bool = False) -> None:
        """`alone`: that epoch, and none before it."""
        self._act(actions.Release(pipeline.pipeline_id, epoch, info.worker_id, info.address, reason, alone))

    def _act(self, action: actions.Action) -> None:
        self._actions.append(action)

    def _publish(self) -> None:
        self._act(actions.Publish())

    def _log(self, message: str, *, warning: bool = False) -> None:
        self._act(actions.Log(message, warning))
