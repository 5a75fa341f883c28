"""Random stories of the coordinator's core: events timely and late, against what gateways and workers rely on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mesh_world import LAYERS, REVISION, World, target

from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.moving import Move
from stagemesh.coordinator.pipeline import Phase, State

NAMES = ("a", "b", "c", "d")


class Stories(RuleBasedStateMachine):
    """Random events, timely and late, against what gateways and workers rely on."""

    @initialize(stages=st.integers(1, 3))
    def start(self, stages: int) -> None:
        self.world = World(target(stages), replicas=dict.fromkeys(range(stages), 2))
        self.stages = stages
        self.assigned: dict[tuple[str, int], dict[int, actions.Assign]] = {}
        self.acked: dict[tuple[str, int], set[int]] = {}
        self.persisted: dict[str, int] = {}
        self.highest: dict[str, int] = {}
        self.nonces: list[int] = []
        self.streams: Counter[str] = Counter()
        self.seen = 0
        for name in NAMES:  # most stories begin with enough workers
            self.world.join(name)
        self.check()

    def check(self) -> None:
        """Every action that came since the last look."""
        world = self.world
        for action in world.actions[self.seen :]:
            match action:
                case actions.PersistEpoch(name, epoch):
                    assert epoch > self.persisted.get(name, 0), "epochs rise strictly"
                    self.persisted[name] = epoch
                case actions.Assign():
                    key = (action.pipeline_id, action.epoch)
                    assert self.persisted[action.pipeline_id] == action.epoch, "written down before it is told"
                    held = self.assigned.setdefault(key, {})
                    assert action.plan.stage not in held
                    assert action.plan.worker_id not in [a.plan.worker_id for a in held.values()]
                    held[action.plan.stage] = action
                    self.nonces.append(action.plan.generation)
                case actions.Prepare():
                    assert 0 <= action.layers[0] < action.layers[1] <= LAYERS
                case actions.MakeLink():
                    self.nonces += action.nonces
                case actions.Activate():
                    assert len(self.assigned[action.pipeline_id, action.epoch]) == self.stages
                case actions.PersistPlan(plan):
                    key = (plan.pipeline_id, plan.epoch)
                    assert self.acked.get(key, set()) == set(range(self.stages)), "serves before every ack"
        self.seen = len(world.actions)

    def send(self, event: events.Event) -> None:
        self.world.send(event)
        self.check()

    @rule(name=st.sampled_from(NAMES), pool=st.sampled_from((-1, -1, 0, 1)), held=st.integers(0, 30))
    def register(self, name: str, pool: int, held: int) -> None:
        claims = (v.Held("pipeline-0", held, 0, (0, 3), 1, True, REVISION),) if held > 28 else ()
        self.world.join(name, pool, held=claims)
        self.check()

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def lose(self, name: str, back: int) -> None:
        self.send(events.WorkerLost(name, self.world.lives[name] - back, "gone"))

    @rule(name=st.sampled_from(NAMES))
    def drain(self, name: str) -> None:
        self.send(events.DrainRequested(name))

    @rule(name=st.sampled_from(NAMES), good=st.booleans(), final=st.booleans())
    def prepared(self, name: str, good: bool, final: bool) -> None:
        if name in self.world.mesh.workers:
            self.world.prepared(name, failed="" if good else "boom", final=final)
            self.check()

    @rule(
        pipeline=st.sampled_from(("pipeline-0", "pipeline-1")),
        stage=st.integers(0, 2),
        back=st.integers(0, 1),
        good=st.booleans(),
    )
    def loaded(self, pipeline: str, stage: int, back: int, good: bool) -> None:
        if pipeline not in self.world.mesh.pipelines:
            return
        epoch = self.world.mesh.pipelines[pipeline].epoch - back
        if stage in self.assigned.get((pipeline, epoch), {}):
            self.send(events.AssignDone(pipeline, epoch, stage, v.Loaded(4 if good else 1, fingerprint=REVISION)))

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
        if pipeline not in self.world.mesh.pipelines:
            return
        at = self.world.mesh.moves.get(pipeline) or self.world.mesh.pipelines[pipeline]
        epoch, phase = at.epoch - back, at.phase
        if isinstance(at, Move) and phase is Phase.LINK:
            for copy in at.copies:
                self.send(events.LinkUp(pipeline, epoch, copy.from_stage, "tcp", copy.index))
        for stage in range(len(at.stages)):
            if phase is Phase.ASSIGN:
                self.send(events.AssignDone(pipeline, epoch, stage, v.Loaded(4, fingerprint=REVISION)))
            elif phase is Phase.LINK and len(at.stages) > 1:
                self.send(events.LinkUp(pipeline, epoch, stage, "tcp"))
            elif phase is Phase.ACTIVATE:
                self.acked.setdefault((pipeline, epoch), set()).add(stage)
                self.send(events.Activated(pipeline, epoch, stage))

    @rule(
        pipeline=st.sampled_from(("pipeline-0", "pipeline-1")),
        stage=st.integers(0, 2),
        what=st.sampled_from(("assign", "link", "activate")),
        final=st.booleans(),
        back=st.integers(0, 1),
    )
    def fail(self, pipeline: str, stage: int, what: str, final: bool, back: int) -> None:
        at = self.world.mesh.pipelines.get(pipeline)
        if at is not None and stage < self.stages - (what == "link"):
            self.send(events.StepFailed(pipeline, at.epoch - back, stage, what, "boom", final, what == "link"))

    @rule(cuts=st.lists(st.integers(1, LAYERS - 1), min_size=2, max_size=2, unique=True))
    def repartition(self, cuts: list[int]) -> None:
        edges = [0, *sorted(cuts[: self.stages - 1]), LAYERS]
        self.send(events.RepartitionRequested(tuple(pairwise(edges))))

    @rule(stage=st.integers(0, 2), replicas=st.integers(0, 2))
    def scale(self, stage: int, replicas: int) -> None:
        if stage < self.stages:
            self.send(events.ScaleRequested(stage, replicas))

    @rule(name=st.sampled_from(("g", "h")), pipeline=st.sampled_from(("pipeline-0", "pipeline-1")))
    def gateway_left(self, name: str, pipeline: str) -> None:
        self.send(events.GatewayLeft(name, pipeline))

    @rule(name=st.sampled_from(("g", "h")), comes=st.booleans())
    def gateway(self, name: str, comes: bool) -> None:
        if comes:
            self.streams[name] += 1
            self.send(events.GatewayCame(name))
        elif self.streams[name]:
            self.streams[name] -= 1
            self.send(events.GatewayGone(name))

    @rule(name=st.sampled_from(("g", "h")), pipeline=st.sampled_from(("pipeline-0", "pipeline-1")), good=st.booleans())
    def gateway_moved(self, name: str, pipeline: str, good: bool) -> None:
        move = self.world.mesh.moves.get(pipeline)
        if move is not None:
            self.send(events.GatewayMoved(name, pipeline, move.epoch, "" if good else "boom"))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1))
    def break_link(self, name: str, back: int) -> None:
        at = self.world.mesh.pipelines.get("pipeline-0")
        if at is not None:
            self.send(events.LinkBroken(name, "pipeline-0", at.epoch - back, "reset"))

    @rule(seconds=st.sampled_from((0.05, 0.3, 2.5)), alive=st.integers(0, 4))
    def wait(self, seconds: float, alive: int) -> None:
        self.world.wait(seconds, *(self.world.mesh.workers if alive else ()))
        self.check()

    @invariant()
    @precondition(lambda self: hasattr(self, "world"))
    def nothing_is_shared_or_lost_from_sight(self) -> None:
        mesh = self.world.mesh
        places: dict[str, set[int]] = {}
        for name, pipeline in mesh.pipelines.items():
            assert pipeline.epoch >= self.highest.get(name, 0)
            self.highest[name] = pipeline.epoch
            assert len({plan.worker_id for plan in pipeline.stages}) == len(pipeline.stages)
            for plan in pipeline.stages:
                places.setdefault(plan.worker_id, set()).add(plan.stage)
            if (move := mesh.moves.get(name)) is not None:
                assert pipeline.state in (State.SERVING, State.DRAINING), "a move of what does not serve"
                assert move.epoch > pipeline.epoch
                for plan in move.stages:
                    places.setdefault(plan.worker_id, set()).add(plan.stage)
            if pipeline.state in (State.SERVING, State.DRAINING):
                ranges = [plan.layers for plan in pipeline.stages]
                assert [r[0] for r in ranges] == [0, *(r[1] for r in ranges[:-1])]
                assert ranges[-1][1] == LAYERS
                assert all(mesh.knows(plan.worker_id, plan.incarnation) for plan in pipeline.stages)
            if pipeline.state is State.DOWN:
                assert pipeline.reason
                assert not pipeline.stages
        assert all(len(stages) == 1 for stages in places.values()), "a worker has the same stage on every pipeline"
        assert mesh.pipelines, "one pipeline at least"
        assert len(set(self.nonces)) == len(self.nonces), "no nonce twice"


TestStories = Stories.TestCase
TestStories.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
