"""The coordinator's core with a clock, and workers that answer as a test wants them to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TypeVar

from stagemesh.checkpoint import CheckpointInfo, Part
from stagemesh.coordinator import values as v
from stagemesh.coordinator.core import actions
from stagemesh.coordinator.core.mesh import Mesh
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.planning.cost import CostModel
from stagemesh.coordinator.planning.target import Target
from stagemesh.coordinator.policy.replicas import check_scale
from stagemesh.coordinator.state.nonces import Nonces
from stagemesh.coordinator.timing import CoordinatorTiming
from stagemesh.coordinator.world.pipeline import Attempt, Pipeline, State
from stagemesh.coordinator.world.record import Record
from stagemesh.coordinator.world.world import World

LAYERS, REVISION, TIMING = 6, "f" * 64, CoordinatorTiming()
LIMITS = v.Limits(64, 4, 32, 16, 0, 3)
INFO = CheckpointInfo(
    hidden_size=8, vocab_size=50, dtype="float32", max_position_embeddings=512, num_kv_heads=2,
    kv_elements_per_token=16, tied=False, layers=(Part(1000, 2000.0),) * LAYERS, embedding=Part(), head=Part(),
)  # fmt: skip
BOTH = (("tcp", (b"t",)), ("ucx", (b"u",)))
A = TypeVar("A")


def target(stages: int = 2, **changes: object) -> Target:
    base = Target(CostModel(INFO, LIMITS, "float32"), stages, LIMITS, REVISION, terms="terms")
    return dataclasses.replace(base, **changes)


class Story:
    """The core with a clock, and the workers' answers as a test wants them."""

    def __init__(self, goal: Target | None = None, record: Record | None = None) -> None:
        self.now = 100.0
        self.world = World(goal or target(), now=self.now, nonce=Nonces(1).next, timing=TIMING, record=record)
        self.mesh = Mesh(self.world)
        self.actions: list[actions.Action] = []
        self.written = self.world.record.copy()
        """What another coordinator would find."""
        self.lives: Counter[str] = Counter()

    def send(self, event: events.Event) -> list[actions.Action]:
        """One event; its actions are kept too."""
        done = self.mesh.handle(event, self.now)
        self.actions += done
        for action in done:
            if isinstance(action, actions.Save):
                assert action is done[0], "nothing is told to anybody before it is written down"
                assert action.before == self.written
                self.written = action.after
        return done

    def took(self, kind: type[A]) -> list[A]:
        """Actions of a kind since last asked, and forgets all of them."""
        found = [a for a in self.actions if isinstance(a, kind)]
        self.actions.clear()
        return found

    def join(self, name: str, pool: int = -1, tp: int = 1, *, same_life: bool = False, **changes: object) -> None:
        if not same_life:
            self.lives[name] += 1
        transports = tuple((n, a * tp) for n, a in BOTH)
        info = v.WorkerInfo(
            name, self.lives[name], f"{name}:1", pool, tp, bytes_per_s=1e10, flops_per_s=1e11, transports=transports
        )
        self.send(events.WorkerRegistered(dataclasses.replace(info, **changes)))

    def lose(self, name: str) -> None:
        self.send(events.WorkerLost(name, self.lives[name], "its keep-alive stream ended"))

    def load(self, stage: int, *, pages: int = 4, revision: str = REVISION, epoch: int | None = None) -> None:
        done = v.Loaded(pages, 10, 20, revision)
        self.send(events.AssignDone("pipeline-0", self.epoch if epoch is None else epoch, stage, done))

    def link(self, stage: int, epoch: int | None = None) -> None:
        """The link behind a stage stands; behind the last but one, the tokens' link from last to first does, too."""
        at = ("pipeline-0", self.epoch if epoch is None else epoch)
        stages = len(self.pipeline.stages)
        if stage == stages - 2:
            self.send(events.LinkUp(*at, stages - 1, "shared memory"))
        self.send(events.LinkUp(*at, stage, "shared memory"))

    def ack(self, stage: int, epoch: int | None = None) -> None:
        self.send(events.Activated("pipeline-0", self.epoch if epoch is None else epoch, stage))

    def prepared(self, name: str, *, revision: str = REVISION, failed: str = "", final: bool = True) -> None:
        """A standby has loaded what it was told to, or could not."""
        layers = self.world.workers[name].preparing or (0, 0)
        if failed:
            self.send(events.PrepareFailed(name, self.lives[name], layers, failed, final))
        else:
            self.send(events.Prepared(name, self.lives[name], layers, revision))

    def fail(self, stage: int, what: str, reason: str = "boom", **flags: bool) -> None:
        self.send(events.StepFailed("pipeline-0", self.epoch, stage, what, reason, **flags))

    def serve(self) -> None:
        """From assigned to serving."""
        stages = len(self.pipeline.stages)
        for stage in range(stages):
            self.load(stage)
        for stage in range(stages - 1):
            self.link(stage)
        for stage in range(stages):
            self.ack(stage)

    def gateway(self, name: str = "g") -> None:
        """One watches the mesh."""
        self.send(events.GatewayCame(name))

    def prepare_move(self, *, layout: str = "") -> None:
        """The next epoch's workers do what they are told, until gateways are."""
        move = self.move
        assert move is not None
        at = ("pipeline-0", move.epoch)
        for stage in range(len(move.stages)):
            self.send(events.AssignDone(*at, stage, v.Loaded(4, 10, 20, REVISION, layout)))
        for link in self.took(actions.MakeLink):
            assert link.epoch == move.epoch
            index = link.copy.index if link.copy is not None else None
            self.send(events.LinkUp(*at, link.stage, "shared memory", index))
        for stage in range(len(move.stages)):
            self.send(events.Activated(*at, stage))

    def moved(self, gateway: str = "g", error: str = "") -> None:
        """A gateway has switched, or says why it could not."""
        assert self.move is not None
        self.send(events.GatewayMoved(gateway, "pipeline-0", self.move.epoch, error))

    def wait(self, seconds: float, *alive: str) -> None:
        """Time passes in ticks of 50 ms; `alive` workers renew."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            for name in alive:
                self.send(events.LeaseRenewed(name, self.lives[name]))
            self.send(events.Tick())

    def check_scale(self, stage: int, replicas: int) -> int:
        return check_scale(self.world, stage, replicas, self.now)

    @property
    def pipelines(self) -> dict[str, Pipeline]:
        return self.world.pipelines

    @property
    def pipeline(self) -> Pipeline:
        return self.world.pipelines["pipeline-0"]

    @property
    def moves(self) -> dict[str, Attempt]:
        return {name: p.beside for name, p in self.world.pipelines.items() if p.beside is not None}

    @property
    def move(self) -> Attempt | None:
        return self.pipeline.beside

    @property
    def epoch(self) -> int:
        return self.pipeline.epoch

    @property
    def state(self) -> State:
        return self.pipeline.state

    @property
    def reason(self) -> str:
        return self.pipeline.reason

    @property
    def final(self) -> bool:
        return self.pipeline.final

    @property
    def ranges(self) -> list[v.Range]:
        return [plan.layers for plan in self.pipeline.stages]

    @property
    def holders(self) -> list[str]:
        return [plan.worker_id for plan in self.pipeline.stages]


def serving(*extra: str, stages: int = 2) -> Story:
    story = Story(target(stages))
    for name in ("a", "b", "c")[:stages] + extra:
        story.join(name)
    story.serve()
    assert story.state is State.SERVING
    story.wait(TIMING.settled_s + 0.1, *story.world.workers)
    story.actions.clear()
    return story
