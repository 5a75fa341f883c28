"""Random stories of the coordinator's core: events timely and late, against what gateways and workers rely on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mesh_world import (
    LAYERS,
    Story,
    activated,
    broken,
    drain,
    held,
    left,
    linked,
    loaded,
    order,
    repartition,
    scale,
    stuck,
    switched,
    target,
    undrain,
)

from stagemesh.coordinator import values as v
from stagemesh.coordinator.core import actions
from stagemesh.coordinator.core.desired import desired
from stagemesh.coordinator.core.mesh import handle
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.world.pipeline import Phase, State
from stagemesh.coordinator.world.record import Record
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1.coordinator_pb2 import WatchPipelinesRequest
from stagemesh.protos.v1.stage_pb2 import ActivateRequest, AssignRequest, ConnectLinkRequest, PrepareRequest

NAMES = ("a", "b", "c", "d")


class Stories(RuleBasedStateMachine):
    """Random events, timely and late, against what gateways and workers rely on."""

    @initialize(stages=st.integers(1, 3))
    def start(self, stages: int) -> None:
        record = Record(replicas=dict.fromkeys(range(stages), 2))
        self.story = Story(target(stages, takeover_s=1.0), record)
        self.stages = stages
        self.assigned: dict[tuple[str, int], dict[int, v.Order]] = {}
        self.ordered: set[tuple[object, ...]] = set()
        self.acked: dict[tuple[str, int], set[int]] = {}
        self.persisted: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        self.nonces: list[int] = []
        self.streams: Counter[str] = Counter()
        self.seen = 0
        for name in NAMES:  # most stories begin with enough workers
            self.story.join(name)
        self.check()

    def once(self, *order: object) -> None:
        """No order is given twice without a reason."""
        assert order not in self.ordered, order
        self.ordered.add(order)

    def check(self) -> None:
        """Every action that came since the last look."""
        story = self.story
        for action in story.actions[self.seen :]:
            match action:
                case actions.Save(before, after):
                    for name, epoch in after.epochs.items():
                        assert epoch >= before.epochs.get(name, 0), "epochs never fall"
                    self.persisted = dict(after.epochs)
                    for name, plan in after.plans.items():
                        if before.plans.get(name) != plan:
                            key = (name, plan.epoch)
                            assert self.acked.get(key, set()) == set(range(len(plan.stages))), "serves before every ack"
                case v.Order(_, AssignRequest(key=key, stage=stage, layers=layers) as told):
                    assert self.persisted[key.pipeline_id] == key.epoch, "written down before it is told"
                    held = self.assigned.setdefault((key.pipeline_id, key.epoch), {})
                    assert stage not in held
                    assert action.to.worker_id not in [a.to.worker_id for a in held.values()]
                    assert layers.first < layers.last, "an empty range"
                    held[stage] = action
                    self.nonces.append(told.generation)
                case v.Order(_, PrepareRequest(layers=layers)):
                    assert 0 <= layers.first < layers.last <= LAYERS
                case v.Order(_, ConnectLinkRequest(key=key) as link):
                    index = link.copy.index if link.HasField("copy") else None
                    self.once("link", key.pipeline_id, key.epoch, link.stage, index)
                    self.nonces += link.nonces
                case v.Order(_, ActivateRequest(key=key, stage=stage)):
                    self.once("activate", key.pipeline_id, key.epoch, stage)
                    assigned = self.assigned[key.pipeline_id, key.epoch]
                    assert sorted(assigned) == list(range(assigned[0].request.num_stages))
                    edges = [v.span(assigned[stage].request.layers) for stage in sorted(assigned)]
                    assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])]
                    assert edges[-1][1] == LAYERS, "every layer once"
        self.seen = len(story.actions)

    def send(self, event: events.Event) -> None:
        self.story.send(event)
        self.check()

    @rule(name=st.sampled_from(NAMES), pool=st.sampled_from((-1, -1, 0, 1)), epoch=st.integers(0, 30))
    def register(self, name: str, pool: int, epoch: int) -> None:
        claims = (held("pipeline-0", epoch, v.StagePlan(0, name, 1, (0, 3), 1)),) if epoch > 28 else ()
        self.story.join(name, pool, held=claims)
        self.check()

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def lose(self, name: str, back: int) -> None:
        self.send(events.WorkerLost(name, self.story.lives[name] - back, "gone"))

    @rule(name=st.sampled_from(NAMES), phases=st.integers(0, 3))
    def lose_for_good(self, name: str, phases: int) -> None:
        """Long enough for the others to take its layers over, and for some of the phases that follow."""
        if name in self.story.world.workers:
            self.send(events.WorkerLost(name, self.story.lives[name], "gone"))
            self.story.wait(2.5, *self.story.world.workers)
            self.check()
            self.advance("pipeline-0", 0, phases)

    @rule(name=st.sampled_from(NAMES))
    def drain(self, name: str) -> None:
        self.send(drain(name))

    @rule(name=st.sampled_from(NAMES), good=st.booleans(), final=st.booleans())
    def prepared(self, name: str, good: bool, final: bool) -> None:
        if name in self.story.world.workers:
            self.story.prepared(name, failed="" if good else "boom", final=final)
            self.check()

    @rule(
        pipeline=st.sampled_from(("pipeline-0", "pipeline-1")),
        stage=st.integers(0, 2),
        back=st.integers(0, 1),
        good=st.booleans(),
    )
    def loaded(self, pipeline: str, stage: int, back: int, good: bool) -> None:
        if pipeline not in self.story.pipelines:
            return
        epoch = self.story.pipelines[pipeline].epoch - back
        if stage in self.assigned.get((pipeline, epoch), {}):
            self.send(loaded(pipeline, epoch, stage, 4 if good else 1))

    @rule(
        pipeline=st.sampled_from(("pipeline-0", "pipeline-1")),
        back=st.sampled_from((0, 0, 0, 1)),
        phases=st.integers(1, 3),
    )
    def advance(self, pipeline: str, back: int, phases: int) -> None:
        """All answers that the next phases of the pipeline wait for, possibly too late."""
        for _ in range(phases):
            self.answer(pipeline, back)

    def answer(self, pipeline: str, back: int) -> None:
        if pipeline not in self.story.pipelines:
            return
        at = self.story.moves.get(pipeline) or self.story.pipelines[pipeline].main
        if at is None:
            return
        epoch, phase = at.epoch - back, at.phase
        if phase is Phase.LINK:
            for copy in at.copies:
                self.send(linked(pipeline, epoch, copy.from_stage, "tcp", copy))
        for stage in range(len(at.stages)):
            if phase is Phase.ASSIGN:
                self.send(loaded(pipeline, epoch, stage))
            elif phase is Phase.LINK and len(at.stages) > 1:
                self.send(linked(pipeline, epoch, stage, "tcp"))
            elif phase is Phase.ACTIVATE:
                self.acked.setdefault((pipeline, epoch), set()).add(stage)
                self.send(activated(pipeline, epoch, stage))

    @rule(
        pipeline=st.sampled_from(("pipeline-0", "pipeline-1")),
        stage=st.integers(0, 2),
        what=st.sampled_from(("assign", "link", "activate")),
        final=st.booleans(),
        back=st.integers(0, 1),
    )
    def fail(self, pipeline: str, stage: int, what: str, final: bool, back: int) -> None:
        at = self.story.pipelines.get(pipeline)
        if at is not None and stage < len(at.stages) - (what == "link"):
            told = order(what, pipeline, at.epoch - back, stage)
            self.send(events.Failed(told, "boom", final, what == "link"))

    @rule(cuts=st.lists(st.integers(1, LAYERS - 1), min_size=2, max_size=2, unique=True))
    def repartition(self, cuts: list[int]) -> None:
        edges = [0, *sorted(cuts[: self.stages - 1]), LAYERS]
        self.send(repartition(*(b - a for a, b in pairwise(edges))))

    @rule(stage=st.integers(0, 2), replicas=st.integers(0, 2))
    def scale(self, stage: int, replicas: int) -> None:
        if stage < self.stages:
            self.send(scale(stage, replicas))

    @rule(name=st.sampled_from(("g", "h")), pipeline=st.sampled_from(("pipeline-0", "pipeline-1")))
    def gateway_left(self, name: str, pipeline: str) -> None:
        self.send(left(name, pipeline))

    @rule(name=st.sampled_from(("g", "h")), comes=st.booleans())
    def gateway(self, name: str, comes: bool) -> None:
        if comes:
            self.streams[name] += 1
            self.send(WatchPipelinesRequest(gateway_id=name, protocol=PROTOCOL))
        elif self.streams[name]:
            self.streams[name] -= 1
            self.send(events.GatewayGone(name))

    @rule(name=st.sampled_from(("g", "h")), pipeline=st.sampled_from(("pipeline-0", "pipeline-1")), good=st.booleans())
    def gateway_moved(self, name: str, pipeline: str, good: bool) -> None:
        move = self.story.moves.get(pipeline)
        if move is not None:
            self.send(switched(name, pipeline, move.epoch, "" if good else "boom"))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def break_link(self, name: str, back: int) -> None:
        at = self.story.pipelines.get("pipeline-0")
        if at is not None:
            self.send(broken(name, self.story.lives[name], "pipeline-0", at.epoch - back, "reset"))

    @rule(seconds=st.sampled_from((0.05, 0.3, 2.5)), alive=st.integers(0, 4))
    def wait(self, seconds: float, alive: int) -> None:
        self.story.wait(seconds, *(self.story.world.workers if alive else ()))
        self.check()

    @rule(name=st.sampled_from(NAMES))
    def undrain(self, name: str) -> None:
        self.send(undrain(name))

    @rule(unreachable=st.sets(st.sampled_from(NAMES), max_size=2))
    def stuck(self, unreachable: set[str]) -> None:
        at = self.story.pipelines.get("pipeline-0")
        if at is not None:
            self.send(stuck("pipeline-0", at.epoch, "stuck", tuple(unreachable)))

    @invariant()
    @precondition(lambda self: hasattr(self, "story"))
    def nothing_is_shared_or_lost_from_sight(self) -> None:
        world = self.story.world
        places: dict[str, set[int]] = {}
        for name, pipeline in world.pipelines.items():
            assert pipeline.epoch >= self.highest.get(name, 0)
            self.highest[name] = pipeline.epoch
            for attempt in pipeline.attempts:
                assert len(set(attempt.workers)) == len(attempt.stages)
                if not attempt.fault:
                    for plan in attempt.stages:
                        places.setdefault(plan.worker_id, set()).add(plan.stage)
            if pipeline.beside is not None:
                assert pipeline.state in (State.SERVING, State.DRAINING), "a move of what does not serve"
                assert pipeline.beside.epoch > pipeline.epoch
            if pipeline.state in (State.SERVING, State.DRAINING):
                ranges = [plan.layers for plan in pipeline.stages]
                assert [r[0] for r in ranges] == [0, *(r[1] for r in ranges[:-1])]
                assert ranges[-1][1] == LAYERS
                assert all(world.knows(plan.worker_id, plan.incarnation) for plan in pipeline.stages)
            if pipeline.state is State.DOWN:
                assert pipeline.reason
                assert not pipeline.stages
        whole = not any(world.is_short(p) for p in world.pipelines.values())
        assert not whole or all(len(stages) == 1 for stages in places.values()), "a stage of its own on every pipeline"
        assert world.pipelines, "one pipeline at least"
        assert len(set(self.nonces)) == len(self.nonces), "no nonce twice"

    @invariant()
    @precondition(lambda self: hasattr(self, "story"))
    def a_plan_promises_nobody_twice(self) -> None:
        plan = desired(self.story.world, self.story.now)
        for name, goal in plan.goals.items():
            assert all(first < last for first, last in (holder.layers for holder in goal.holders)), "an empty range"
            assert not goal.holders or goal.holders[-1].layers[1] == LAYERS
            for other, theirs in plan.goals.items():
                if other != name:
                    at = {h.worker_id: stage for stage, h in enumerate(theirs.holders)}
                    assert all(at.get(h.worker_id, stage) == stage for stage, h in enumerate(goal.holders))

    @invariant()
    @precondition(lambda self: hasattr(self, "story"))
    def the_same_world_leads_nowhere_else(self) -> None:
        """What was ordered is ordered; asking again orders nothing more."""
        again = handle(self.story.world, events.Tick(), self.story.now)
        assert not [a for a in again if not isinstance(a, actions.Publish)], again


TestStories = Stories.TestCase
TestStories.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
