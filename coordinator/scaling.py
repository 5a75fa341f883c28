"""How many pipelines there are: as many as the stage with the most replicas has workers.

A stage's replicas are what an operator wants (`stagemesh scale`), else the workers that were started for it
(`--stage`). With one more, another pipeline is made over the stages that have fewer: first those that serve do with a
smaller part of their workers' pages, then it is formed. With one fewer, a pipeline finishes what it runs, or its
gateways have another one do that, and when all have left it, it is no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stagemesh.errors import ConfigError, Unavailable
from stagemesh.protocol import MOVES

from . import actions, events
from . import values as v
from .moving import Mover
from .pipeline import Phase, Pipeline, State
from .planning import CannotForm, Choice, choose
from .rebalance import StepTimes
from .replicas import choose_beside, holders, pinned

FIRST = "pipeline-0"
MISSED_S = 30.0
"""So long a worker that is lost counts as a replica: it may come back."""
AGAIN_S = 60.0
"""After moves that failed, a pipeline is left as it is for so long, or until the membership changes."""
LEAVE_S = 90.0
"""How long gateways may take to leave a pipeline."""
SETTLED_S = 1.5
"""So long a pipeline that was just formed is left alone by what can wait."""
UP = (State.SERVING, State.DRAINING)
LIMITLESS = 1 << 30


class Scaler(Mover):
    """Pipelines come and go."""

    def __init__(self, *args: Any, replicas: Mapping[int, int] | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self.replicas = dict(replicas or {})
        """Stage -> workers that an operator wants on it at once."""
        self._missed: dict[str, tuple[int, float]] = {}
        """Workers that were lost, with the stage that they were started for, and until when they count."""
        self._lost_with: dict[str, int] = {}
        """Workers that were lost as they held the stage that they were started for."""
        self._left: dict[str, set[str]] = {}
        """Pipeline that is left -> gateways that have."""
        self._leave_by: dict[str, float] = {}
        self._pages: dict[tuple[str, int], int] = {}
        """Worker and its life -> KV pages of a gateway that it has for all pipelines."""
        self._share_limit = LIMITLESS
        """Pipelines that can share pages, as far as that was tried in vain."""
        self._in_vain: dict[str, tuple[int, float]] = {}
        """Pipelines that could not be changed -> the membership's version then, and until when that is not tried."""

    # -- how many there are to be -----------------------------------------------------------------------------------

    def check_scale(self, stage: int, replicas: int) -> int:
        """How many pipelines there would be. Raises ConfigError where workers or pages are too few, Unavailable where
        that cannot be told before what is down serves again."""
        if stage >= self.target.num_stages:
            raise ConfigError(f"there is no stage {stage}: the pipelines have stages 0 to {self.target.num_stages - 1}")
        old = [w.info.worker_id for w in self.workers.values() if w.info.protocol < MOVES]
        old += sorted(self._followers() & self._old_gateways)
        if replicas > 1 and old:
            raise ConfigError(f"{', '.join(old)} cannot share stages: finish the upgrade first")
        holding = {p.stages[stage].worker_id for p in self._kept() if stage < len(p.stages)}
        down = [p.pipeline_id for p in self._kept() if p.state not in UP or self._is_short(p)]
        if replicas > max(1, len(holding)) and down:
            raise Unavailable(f"{', '.join(down)} must have all stages again first", retry_after_s=1)
        spare = {w.info.worker_id for w in self._spare() if w.info.may_hold(stage)}
        # Those could take their stage from a worker that could then take this one.
        spare |= {name for p in self._kept() for s, name in self._replaceable(p).items() if s != stage}
        if replicas > len(holding) + len(spare):
            raise ConfigError(
                f"stage {stage} is held by {len(holding)} worker(s), and {len(spare)} more could take it: for "
                f"{replicas} replicas start {replicas - len(holding) - len(spare)} more with `stagemesh stage --stage "
                f"{stage}`, or standbys"
            )
        each = self._replicas({**self.replicas, stage: replicas})
        there = sum(not worker.draining for worker in self.workers.values())
        if replicas > len(holding) and sum(each) > there:
            shown = ", ".join(map(str, each))
            raise ConfigError(
                f"the stages would have {shown} workers, {sum(each)} in all, and there are {there}: start "
                f"{sum(each) - there} more, or have fewer on another stage"
            )
        self._check_pages(max(each))
        return max(each)

    def _check_pages(self, pipelines: int) -> None:
        """Raises ConfigError where a share of the pages would not hold one sequence."""
        need, size = self.target.limits.pages_per_sequence, self.target.limits.page_size
        for pipeline in self.pipelines.values():
            for stage, loaded in pipeline.loaded.items():
                pages = loaded.num_pages * pipeline.shares // pipelines
                if pages < need:
                    raise ConfigError(
                        f"worker {pipeline.stages[stage].worker_id} would have {pages} KV pages of {size} tokens for "
                        f"each of {pipelines} pipelines, and one sequence of --max-model-len needs {need}: give the "
                        "workers more (--kv-cache-gib, --num-kv-pages)"
                    )

    def _replicas(self, wishes: Mapping[int, int]) -> list[int]:
        """Workers that each stage is to have at once."""
        bound = Counter(worker.info.pool for worker in self.workers.values() if not worker.draining)
        bound.update(stage for stage, until in self._missed.values() if self._now < until)
        return [wishes.get(stage) or max(1, bound[stage]) for stage in range(self.target.num_stages)]

    def _num_wanted(self) -> int:
        wanted = min(max(self._replicas(self.replicas)), self._most_shares())
        upgrading = any(w.info.protocol < MOVES for w in self.workers.values())
        if upgrading or self._followers() & self._old_gateways:
            return min(wanted, max(1, len(self._kept())))
        return wanted

    def _most_shares(self) -> int:
        """Pipelines for which the pages of those workers suffice of which that is known."""
        need = self.target.limits.pages_per_sequence
        known = [self._pages.get((w.info.worker_id, w.info.incarnation), LIMITLESS) for w in self.workers.values()]
        return max(1, min([pages // need for pages in known] + [self._share_limit]))

    def _assign_done(self, pipeline: Pipeline, stage: int, loaded: v.Loaded) -> None:
        plan = pipeline.stages[stage]
        key = plan.worker_id, plan.incarnation
        self._pages[key] = max(self._pages.get(key, 0), loaded.num_pages * pipeline.shares)
        super()._assign_done(pipeline, stage, loaded)

    def _refuse(self, pipeline: Pipeline, stage: int, reason: str) -> None:
        if pipeline.shares == 1:
            super()._refuse(pipeline, stage, reason)
            return
        # A smaller share may be all that is wrong with it; if not, it is refused when it is asked for the whole.
        self._share_limit = pipeline.shares - 1
        self.given_up = f"{self._share_limit} pipeline(s), and no more: stage {stage}: {reason}"
        self._log(self.given_up, warning=True)
        self._interrupt(pipeline, f"stage {stage}: {reason}", self._backoff_s(pipeline))

    def _miss(self, worker: v.Worker) -> None:
        """A worker is lost."""
        self._pages.pop((worker.info.worker_id, worker.info.incarnation), None)
        if worker.info.pool >= 0 and not worker.draining:
            self._missed[worker.info.worker_id] = worker.info.pool, self._now + MISSED_S
            if any(p.stage_of(worker.info.worker_id) == worker.info.pool for p in self.pipelines.values()):
                known = self.workers.keys() | self._missed.keys()
                self._lost_with = {name: stage for name, stage in self._lost_with.items() if name in known}
                self._lost_with[worker.info.worker_id] = worker.info.pool

    def _scale(self, stage: int, replicas: int) -> None:
        """An operator's wish."""
        self.replicas.pop(stage, None)
        if replicas:
            self.replicas[stage] = replicas
        self.given_up, self._share_limit = "", LIMITLESS
        self._failed.clear()
        self._version += 1
        self._act(actions.PersistReplicas(tuple(sorted(self.replicas.items()))))
        self._log(f"stage {stage} is to have {replicas or 'as many replicas as were started for it'}")

    def _scale_if_due(self) -> None:
        """Makes pipelines, and has them left."""
        missed = {n: m for n, m in self._missed.items() if m[1] > self._now and n not in self.workers}
        if len(missed) < len(self._missed):
            # Others may be formed now that need not wait for them.
            self._missed, self._version = missed, self._version + 1
        wanted, kept = self._num_wanted(), self._kept()
        for pipeline in [p for p in self.pipelines.values() if p.leaving][: max(0, wanted - len(kept))]:
            self._stay(pipeline)
        for _ in range(wanted - len(self._kept())):
            self._add()
        for _ in range(len(self._kept()) - wanted):
            self._leave(self._least_of_use())
        for pipeline in [p for p in self.pipelines.values() if p.leaving]:
            gone = self._followers() <= self._left[pipeline.pipeline_id]
            if gone or pipeline.state is not State.DRAINING or self._now > self._leave_by[pipeline.pipeline_id]:
                self._remove(pipeline)

    def _kept(self) -> list[Pipeline]:
        return [p for p in self.pipelines.values() if not p.leaving]

    # -- one comes, one goes ----------------------------------------------------------------------------------------

    def _add(self) -> None:
        name = next(name for i in range(len(self.pipelines) + 1) if (name := f"pipeline-{i}") not in self.pipelines)
        epoch = self._highest.setdefault(name, 0)
        self.pipelines[name] = Pipeline(name, epoch, reason="it is to be formed")
        self.step_times[name] = StepTimes()
        self._version += 1
        self._log(f"{name} is to be made, over stages that it shares with others")
        self._publish()

    def _note_epoch(self, pipeline_id: str, epoch: int) -> None:
        """A pipeline that is not known had this epoch."""
        if epoch > self._highest.get(pipeline_id, 0):
            self._highest[pipeline_id] = epoch
            self._act(actions.PersistEpoch(pipeline_id, epoch))

    def _least_of_use(self) -> Pipeline:
        """The one that cannot serve, else the one whose worker drains, else the one that came last."""

        def use(pipeline: Pipeline) -> tuple[bool, bool]:
            drains = any(w.draining for name in self._names(pipeline) if (w := self.workers.get(name)))
            return pipeline.state in UP, not drains

        return min(reversed(self._kept()), key=use)

    def _leave(self, pipeline: Pipeline) -> None:
        pipeline.leaving = True
        self._left[pipeline.pipeline_id] = set()
        self._leave_by[pipeline.pipeline_id] = self._now + LEAVE_S
        self._end_move(pipeline.pipeline_id)
        if pipeline.state is State.SERVING:
            pipeline.state = State.DRAINING
        pipeline.reason = "there are fewer replicas"
        self._log(f"{pipeline.pipeline_id} is left: there are fewer replicas")
        self._publish()

    def _stay(self, pipeline: Pipeline) -> None:
        """It is wanted again."""
        pipeline.leaving = False
        if pipeline.state is State.DRAINING:
            pipeline.state, pipeline.reason = State.SERVING, ""
        self._publish()

    def _gateway_left(self, event: events.GatewayLeft) -> None:
        if (pipeline := self.pipelines.get(event.pipeline_id)) is not None and pipeline.leaving:
            self._left[event.pipeline_id].add(event.gateway_id)

    def _remove(self, pipeline: Pipeline) -> None:
        name = pipeline.pipeline_id
        self._end_move(name)
        self._new_epoch(pipeline, keep=set(), reason="the pipeline is no more")
        del self.pipelines[name], self.step_times[name], self._left[name], self._leave_by[name]
        for known in (self._advised, self._failed, self._move_after, self._in_vain, self._wants):
            known.pop(name, None)
        self._act(actions.ForgetPlan(name))
        self._version += 1
        self._log(f"{name} is no more")
        self._publish()

    # -- what moving and forming do otherwise for several -----------------------------------------------------------

    def _num_shares(self) -> int:
        return len(self.pipelines)

    def _choose(self, pipeline: Pipeline, previous: Sequence[v.StagePlan]) -> list[Choice]:
        others = self._others(pipeline)
        if not any(others):
            return super()._choose(pipeline, previous)
        # Also where one is about to have them: a move may fail.
        if any(self._is_short(p) for p in self.pipelines.values() if p is not pipeline):
            raise CannotForm("it waits until the others have all their stages again", final=False)
        ranges = [plan.layers for plan in next(stages for stages in others if stages)]
        pins = pinned(holders(others, self.workers), self._replicas(self.replicas), previous)
        shared = {stage: self.workers[name] for stage, name in pins.items()}
        try:
            return choose_beside(self.target, self._free_for(pipeline), shared, ranges, previous)
        except CannotForm:
            others_try = any(p.state is State.FORMING and p.phase is not Phase.RETRY for p in self.pipelines.values())
            if pipeline.state in UP or others_try or any(p.state in UP for p in self.pipelines.values()):
                raise
        # Nothing serves: what another one was to have beside it is better used here.
        choose(self.target, [w for w in self.workers.values() if not w.draining], previous)
        for other in self.pipelines.values():
            if other is not pipeline:
                self._down(other, f"its workers are needed for {pipeline.pipeline_id}", final=False)
        return super()._choose(pipeline, previous)

    def _others(self, pipeline: Pipeline) -> list[Sequence[v.StagePlan]]:
        """The stages of each of the others, as they are going to be."""
        others = [p for p in self.pipelines.values() if p is not pipeline and not p.leaving]
        return [(self.moves.get(p.pipeline_id) or p).stages for p in others]

    def _form_if_due(self, pipeline: Pipeline) -> None:
        others = [p for p in self.pipelines.values() if p is not pipeline]
        # What waits to be tried again gets its share then.
        counts = (p for p in others if p.stages and p.phase is not Phase.RETRY)
        waits_for = [p for p in counts if p.shares < self._num_shares()]
        # Those of before a restart hold workers that nobody has told of yet.
        if not waits_for and not pipeline.leaving and not any(p.restored for p in others):
            super()._form_if_due(pipeline)

    def _move_if_due(self, pipeline: Pipeline) -> None:
        if not pipeline.leaving:
            super()._move_if_due(pipeline)

    def _wanted(self, pipeline: Pipeline, leaving: Sequence[v.StagePlan]) -> tuple[list[Choice], str]:
        chosen, why = super()._wanted(pipeline, leaving)
        if chosen:
            return chosen, why
        version, until = self._in_vain.get(pipeline.pipeline_id, (-1, 0.0))
        if version == self._version and self._now < until:
            return [], ""
        elsewhere, why = self._elsewhere(pipeline)
        shares = self._num_shares()
        if not elsewhere and pipeline.shares == shares:
            return [], ""
        names = [elsewhere.get(plan.stage, plan.worker_id) for plan in pipeline.stages]
        why = why or f"pages are split between {shares} pipeline(s)"
        return [Choice(self.workers[n], plan.layers) for n, plan in zip(names, pipeline.stages, strict=True)], why

    def _elsewhere(self, pipeline: Pipeline) -> tuple[dict[int, str], str]:
        """Stages that a pipeline is to have on other workers than it has, and why."""
        if self._is_short(pipeline):
            return {}, ""
        held = holders(self._others(pipeline), self.workers)
        replicas = self._replicas(self.replicas)
        pins = pinned(held, replicas, pipeline.stages)
        if elsewhere := {s: name for s, name in pins.items() if pipeline.stages[s].worker_id != name}:
            return elsewhere, "there are fewer replicas"
        later = list(self.pipelines.values())
        later = later[later.index(pipeline) + 1 :]
        for plan in pipeline.stages:
            shared_by_later = any(plan.worker_id in self._names(p) for p in later)
            if plan.worker_id in held.get(plan.stage, ()) and len(held[plan.stage]) < replicas[plan.stage]:
                able = [w for w in self._spare() if w.info.may_hold(plan.stage)]
                able = [w for w in able if (plan.stage, plan.layers) not in w.refusals]
                if able and not shared_by_later:
                    best = max(able, key=lambda w: (w.info.pool == plan.stage, w.kept == plan.layers))
                    return {plan.stage: best.info.worker_id}, "there are more replicas"
        one = dict(list(self._replaceable(pipeline).items())[:1])
        if one and any(p.state is State.DOWN for p in self._kept()):
            return one, "a worker of no stage is needed elsewhere"
        return self._returned(pipeline)

    def _returned(self, pipeline: Pipeline) -> tuple[dict[int, str], str]:
        """A stage that goes back to the worker that it was lost with, and why: where what is spare could take but its
        own stage, the next loss could have two change hands."""
        if not self._is_settled() or any(w.info.pool < 0 or w.info.any_stage for w in self._spare()):
            return {}, ""
        for stage, name in self._replaceable(pipeline).items():
            holder, worker = self._worker_at(pipeline, stage), self.workers[name]
            alike = holder.info.tp_size == worker.info.tp_size
            choice = Choice(worker, pipeline.stages[stage].layers)
            if self._lost_with.get(name) == stage and alike and self._knows_moves(pipeline, [choice]):
                return {stage: name}, "a worker of no stage is to stand by for any"
        return {}, ""

    def _is_settled(self) -> bool:
        """Whether there is one pipeline, nobody drains, and what was lost has been computed again."""
        since = max(p.serving_since for p in self.pipelines.values())
        leaves = any(w.draining for w in self.workers.values())
        return len(self.pipelines) == 1 and not leaves and self._now >= since + SETTLED_S

    def _give_up(self, pipeline: Pipeline, why: str) -> None:
        if self.ranges is not None:
            super()._give_up(pipeline, why)
            return
        self._in_vain[pipeline.pipeline_id] = self._version, self._now + AGAIN_S
        self._lost_with.clear()
        self._failed.pop(pipeline.pipeline_id, None)
        self.given_up = f"{pipeline.pipeline_id} stays as it is: {why}"
        self._log(self.given_up, warning=True)
        self._publish()

    def _replaceable(self, pipeline: Pipeline) -> dict[int, str]:
        """Stages on workers that could hold any, where one that is spare can hold this one only."""
        bound = {w.info.pool: w for w in self._spare() if w.info.pool >= 0}
        return {
            plan.stage: bound[plan.stage].info.worker_id
            for plan in pipeline.stages
            if plan.stage in bound
            and self._worker_at(pipeline, plan.stage).info.pool != plan.stage
            and (plan.stage, plan.layers) not in bound[plan.stage].refusals
        }

    def _spare(self) -> list[v.Worker]:
        """Workers that no pipeline uses, nor is going to."""
        used = {plan.worker_id for p in [*self.pipelines.values(), *self.moves.values()] for plan in p.stages}
        return [w for name, w in self.workers.items() if name not in used and not w.draining]

    # -- small words ------------------------------------------------------------------------------------------------

    def _is_short(self, pipeline: Pipeline) -> bool:
        """Whether it has fewer stages than there should be (survivors.py)."""
        return 0 < len(pipeline.stages) < self.target.num_stages

    @staticmethod
    def _names(pipeline: Pipeline) -> list[str]:
        return [plan.worker_id for plan in pipeline.stages]
