"""The coordinator's core with a clock, and workers that answer as a test wants them to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TypeVar

from stagemesh.checkpoint import CheckpointInfo, Part
from stagemesh.coordinator import actions, events
from stagemesh.coordinator import values as v
from stagemesh.coordinator.cost import CostModel
from stagemesh.coordinator.nonce import Nonces
from stagemesh.coordinator.pipeline import State
from stagemesh.coordinator.planning import Target
from stagemesh.coordinator.reconfigure import Mesh
from stagemesh.coordinator.standbys import REFILLED_S

LAYERS, REVISION, LEASE_S = 6, "f" * 64, 0.6
LIMITS = v.Limits(64, 4, 32, 16, 0, 3)
INFO = CheckpointInfo(
    path="m", architecture="A", model_type="llama", num_layers=LAYERS, hidden_size=8, vocab_size=50, dtype="float32",
    max_position_embeddings=512, num_heads=2, num_kv_heads=2, head_dim=4, kv_elements_per_token=16, tied=False,
    layers=(Part(4000, 1000, 2000.0),) * LAYERS, embedding=Part(), head=Part(),
)  # fmt: skip
BOTH = (("tcp", (b"t",)), ("ucx", (b"u",)))
A = TypeVar("A")


def target(stages: int = 2, **changes: object) -> Target:
    base = Target(CostModel(INFO, LIMITS, "float32"), stages, LIMITS, REVISION, terms="terms")
    return dataclasses.replace(base, **changes)


class World:
    """The core with a clock, and the workers' answers as a test wants them."""

    def __init__(self, goal: Target | None = None, **kwargs: object) -> None:
        self.now = 100.0
        goal = goal or target()
        self.mesh = Mesh(goal, now=self.now, nonce=Nonces(1).next, lease_s=LEASE_S, **kwargs)  # type: ignore[arg-type]
        self.actions: list[actions.Action] = []
        self.written = {name: kwargs.get(name) for name in ("wished", "drains")}
        """What an operator asked for, as another coordinator would find it."""
        self.plan: v.StoredPlan | None = None
        """The pipeline as it was last written down."""
        self.lives: Counter[str] = Counter()

    def send(self, event: events.Event) -> list[actions.Action]:
        """One event; its actions are kept too."""
        done = self.mesh.handle(event, self.now)
        self.actions += done
        for action in done:
            if isinstance(action, actions.PersistPartition):
                self.written["wished"] = action.counts
            elif isinstance(action, actions.PersistPlan):
                self.plan = action.plan
            elif isinstance(action, actions.PersistDrains):
                self.written["drains"] = dict(action.drains)
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
        stages = len(self.mesh.pipelines["pipeline-0"].stages)
        if stage == stages - 2:
            self.send(events.LinkUp(*at, stages - 1, "shared memory"))
        self.send(events.LinkUp(*at, stage, "shared memory"))

    def ack(self, stage: int, epoch: int | None = None) -> None:
        self.send(events.Activated("pipeline-0", self.epoch if epoch is None else epoch, stage))

    def prepared(self, name: str, *, revision: str = REVISION, failed: str = "", final: bool = True) -> None:
        """A standby has loaded what it was told to, or could not."""
        layers = self.mesh.workers[name].preparing or (0, 0)
        if failed:
            self.send(events.PrepareFailed(name, self.lives[name], layers, failed, final))
        else:
            self.send(events.Prepared(name, self.lives[name], layers, revision))

    def fail(self, stage: int, what: str, reason: str = "boom", **flags: bool) -> None:
        self.send(events.StepFailed("pipeline-0", self.epoch, stage, what, reason, **flags))

    def serve(self) -> None:
        """From assigned to serving."""
        stages = len(self.mesh.pipelines["pipeline-0"].stages)
        for stage in range(stages):
            self.load(stage)
        for stage in range(stages - 1):
            self.link(stage)
        for stage in range(stages):
            self.ack(stage)

    def gateway(self, name: str = "g") -> None:
        """One follows the mesh."""
        self.send(events.GatewayCame(name))

    def prepare_move(self, *, layout: str = "") -> None:
        """The next epoch's workers do what they are told, until gateways are."""
        move = self.mesh.moves["pipeline-0"]
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
        """A gateway has gone over, or says why it could not."""
        self.send(events.GatewayMoved(gateway, "pipeline-0", self.mesh.moves["pipeline-0"].epoch, error))

    def wait(self, seconds: float, *alive: str) -> None:
        """Time passes in ticks of 50 ms; `alive` workers renew."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            for name in alive:
                self.send(events.LeaseRenewed(name, self.lives[name]))
            self.send(events.Tick())

    @property
    def epoch(self) -> int:
        return self.mesh.pipelines["pipeline-0"].epoch

    @property
    def state(self) -> State:
        return self.mesh.pipelines["pipeline-0"].state

    @property
    def reason(self) -> str:
        return self.mesh.pipelines["pipeline-0"].reason

    @property
    def final(self) -> bool:
        return self.mesh.pipelines["pipeline-0"].final

    @property
    def ranges(self) -> list[v.Range]:
        return [plan.layers for plan in self.mesh.pipelines["pipeline-0"].stages]

    @property
    def holders(self) -> list[str]:
        return [plan.worker_id for plan in self.mesh.pipelines["pipeline-0"].stages]


def serving(*extra: str, stages: int = 2, **kwargs: object) -> World:
    world = World(target(stages), **kwargs)
    for name in ("a", "b", "c")[:stages] + extra:
        world.join(name)
    world.serve()
    assert world.state is State.SERVING
    world.wait(REFILLED_S + 0.1, *world.mesh.workers)
    world.actions.clear()
    return world
