"""The coordinator's core: events in, actions out; no I/O, and the clock is an argument.

This part is membership: leases, registrations, and what a coordinator takes up again after a restart. The life of a
pipeline is in forming.py, its changes beside serving in moving.py, how many there are in scaling.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import actions, events
from . import values as v
from .moving import Move
from .pipeline import Pipeline, State
from .planning import Target
from .scaling import FIRST
from .survivors import Survivors

# After a restart: one lease, and the longest that a worker may take to call again (its channel's back-off of 1 s and a
# fifth, its own pause).
RECONNECT_S = 1.6
# A core that was not run for so long (a stopped process, a suspended machine) has heard no renewals.
STALL_S = 0.3
LOST_SHOWN = 64


class Mesh(Survivors):
    """Membership and pipelines."""

    def __init__(
        self,
        target: Target,
        *,
        now: float,
        nonce: Callable[[], int],
        lease_s: float = 0.6,
        epochs: Mapping[str, int] | None = None,
        plans: Mapping[str, v.StoredPlan] | None = None,
        replicas: Mapping[int, int] | None = None,
        wished: Sequence[int] | None = None,
        drains: Mapping[str, int] | None = None,
        first_epoch: int = 1,
    ) -> None:
        """No epoch that is made here is below `first_epoch`."""
        super().__init__(
            target,
            now=now,
            nonce=nonce,
            pipeline_ids=sorted(plans or (FIRST,)),
            epochs=epochs,
            replicas=replicas,
            wished=wished,
            first_epoch=first_epoch,
        )
        self.lease_s = lease_s
        self.lost: dict[str, v.WorkerInfo] = {}
        self._drains = dict(drains or {})
        """Worker -> its life that drains: also where that was asked of a coordinator before this one."""
        self._last_tick = now
        self._took_up = bool(plans)
        """There were pipelines before a restart."""
        self._restore_until = now + lease_s + RECONNECT_S
        for name, plan in (plans or {}).items():
            pipeline = self.pipelines.get(name)
            # A later epoch may have been begun beside it; if it was begun instead, the workers will not hold this one.
            if pipeline and plan.epoch <= pipeline.epoch and plan.terms == target.terms:
                pipeline.restored = plan
                pipeline.reason = "the coordinator restarted and waits for the workers to report"

    @property
    def restoring(self) -> bool:
        """Whether a pipeline from before a restart may still turn out to be active."""
        return any(pipeline.restored for pipeline in self.pipelines.values())

    def settles(self, now: float) -> bool:
        """Whether it has started so recently that workers of before may still have to come back."""
        return now < self._restore_until

    def handle(self, event: events.Event, now: float) -> list[actions.Action]:
        """Takes one event at clock time `now` (seconds, monotonic); returns what is to be done, in order."""
        self._now, self._actions = max(now, self._now), []
        match event:
            case events.Tick():
                self._tick()
            case events.WorkerRegistered(info):
                self._register(info)
            case events.LeaseRenewed(worker_id, incarnation):
                if self.knows(worker_id, incarnation):
                    self.workers[worker_id].deadline = self._now + self.lease_s
            case events.WorkerLost(worker_id, incarnation, reason):
                if self.knows(worker_id, incarnation):
                    self._lose(worker_id, reason)
            case events.DrainRequested(worker_id):
                self._drain(worker_id)
            case events.LinkBroken():
                self._link_broken(event)
            case events.StepsStuck():
                self._steps_stuck(event)
            case events.Prepared() | events.PrepareFailed():
                self._prepared(event)
            case events.GatewayCame(gateway_id, protocol):
                self._gateway_came(gateway_id, protocol)
            case events.GatewayGone(gateway_id):
                self._gateway_gone(gateway_id)
            case events.GatewayMoved():
                self._gateway_moved(event)
            case events.StepsMeasured():
                self._steps_measured(event)
            case events.RepartitionRequested(ranges):
                self._repartition(ranges)
            case events.ScaleRequested(stage, count):
                self._scale(stage, count)
            case events.GatewayLeft():
                self._gateway_left(event)
            case _:
                self._order_answered(event)
        if not (self._took_up and (self.restoring or self.settles(self._now))):
            self._scale_if_due()
        for pipeline in list(self.pipelines.values()):
            self._rebalance_if_due(pipeline)
            self._move_if_due(pipeline)
            self._form_if_due(pipeline)
        self._warm_standbys()
        self._advise_if_due()
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
        for worker in self.workers.values():
            if worker.refusals and worker.refused_until <= self._now:
                worker.refusals.clear()
                self._version += 1
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
            draining = self._drains.get(info.worker_id) == info.incarnation
            self.workers[info.worker_id] = v.Worker(info, self._now + self.lease_s, draining=draining)
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
        for held in info.held:
            if held.pipeline_id not in self.pipelines:
                self._note_epoch(held.pipeline_id, held.epoch)
                self._act(
                    actions.Release(held.pipeline_id, held.epoch, info.worker_id, info.address, "no such pipeline")
                )
        for pipeline in self.pipelines.values():
            held_epoch = max((h.epoch for h in info.held if h.pipeline_id == pipeline.pipeline_id), default=0)
            if held_epoch > self._highest[pipeline.pipeline_id]:
                self._later_epoch(pipeline, held_epoch, f"worker {info.worker_id}")
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
            at = self._at(held.pipeline_id, held.epoch)
            current = at is not None and at.stage_of(worker.info.worker_id) is not None
            if held.pipeline_id == pipeline.pipeline_id and not current:
                self._release(pipeline, held.epoch, worker.info, "its epoch has passed", alone=True)

    @staticmethod
    def _holds(info: v.WorkerInfo, pipeline_id: str, epoch: int, plan: v.StagePlan) -> bool:
        wanted = (pipeline_id, epoch, plan.stage, plan.layers, plan.generation, True)
        return any((h.pipeline_id, h.epoch, h.stage, h.layers, h.generation, h.active) == wanted for h in info.held)

    def _lose(self, worker_id: str, reason: str) -> None:
        worker = self.workers.pop(worker_id)
        self.lost[worker_id] = worker.info
        self._ucx_failed = {k: e for k, e in self._ucx_failed.items() if worker.info.incarnation not in k}
        self._act(actions.Disconnect(worker.info.address))
        while len(self.lost) > LOST_SHOWN:
            self.lost.pop(next(iter(self.lost)))
        self._version += 1
        self._miss(worker)
        self._log(f"worker {worker_id} is lost: {reason}", warning=True)
        for pipeline in self.pipelines.values():
            stage = pipeline.stage_of(worker_id)
            if stage is not None:
                self._interrupt(pipeline, f"stage {stage}: worker {worker_id} is lost: {reason}")
        self._leaves_moves(list(self.moves.values()), worker_id, f"worker {worker_id} is lost: {reason}")
        self._publish()

    def _drain(self, worker_id: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is None or worker.draining:
            return
        worker.draining = True
        here = [name for name in self._drains if name in self.workers or name in self.lost or self.settles(self._now)]
        self._drains = {name: self._drains[name] for name in here} | {worker_id: worker.info.incarnation}
        self._act(actions.PersistDrains(tuple(sorted(self._drains.items()))))
        self._failed.clear()
        self._version += 1
        self._log(f"worker {worker_id} drains")
        for pipeline in self.pipelines.values():
            stage = pipeline.stage_of(worker_id)
            if stage is None:
                continue
            if pipeline.state is State.FORMING:
                self._interrupt(pipeline, f"stage {stage}: worker {worker_id} drains")
        # Where gateways go over already they had better arrive: from there the worker's layers go on to others.
        moves = [move for move in self.moves.values() if not move.published]
        self._leaves_moves(moves, worker_id, f"worker {worker_id} drains")
        self._publish()

    def _leaves_moves(self, moves: Sequence[Move], worker_id: str, reason: str) -> None:
        for move in [m for m in moves if m.stage_of(worker_id) is not None]:
            move.counts = False
            self._interrupt(move, reason)

    # After a restart

    def _try_adopt(self, pipeline: Pipeline) -> None:
        """Takes a pipeline of before the restart over as it is, once every one of its workers reports it active, with
        the move that gateways were told of."""
        plan = pipeline.restored
        assert plan is not None
        following = plan.next
        plans = [(plan, stage) for stage in plan.stages]
        plans += [(following, stage) for stage in following.stages] if following is not None else []
        for at, stage in plans:
            worker = self.workers.get(stage.worker_id)
            if worker is None:
                return
            same_life = worker.info.incarnation == stage.incarnation
            if not same_life or not self._holds(worker.info, pipeline.pipeline_id, at.epoch, stage):
                self._give_up_restoring(pipeline, f"worker {stage.worker_id} no longer holds stage {stage.stage}")
                return
        self._take_up(pipeline, plan)
        if following is not None:
            self._take_up_move(pipeline, following)
        for worker in self.workers.values():
            # What a move has left behind of which gateways were not told.
            self._release_stale(pipeline, worker)
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
