"""The coordinator's core with a clock, and workers that answer as a test wants them to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stagemesh.coordinator import values as v
from stagemesh.coordinator.core import actions
from stagemesh.coordinator.core.mesh import handle
from stagemesh.coordinator.observe import events
from stagemesh.coordinator.planning.target import Target
from stagemesh.coordinator.policy.replicas import check_scale
from stagemesh.coordinator.state.nonces import nonces
from stagemesh.coordinator.timing import CoordinatorTiming
from stagemesh.coordinator.world.pipeline import Attempt, Pipeline, State
from stagemesh.coordinator.world.record import Record
from stagemesh.coordinator.world.world import World
from stagemesh.models.size import CheckpointInfo, Part
from stagemesh.planning.cost import CostModel
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import coordinator_pb2 as pb
from stagemesh.protos.v1 import stage_pb2, types_pb2

LAYERS, REVISION, TIMING = 6, "f" * 64, CoordinatorTiming()
LIMITS = types_pb2.RunLimits(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32, page_size=16, steps_in_flight=3, gateways=1
)
INFO = CheckpointInfo(
    hidden_size=8, vocab_size=50, dtype="float32", max_position_embeddings=512, num_kv_heads=2,
    kv_elements_per_token=16, tied=False, layers=(Part(1000, 2000.0),) * LAYERS, embedding=Part(), head=Part(),
)  # fmt: skip
BOTH = (("tcp", (b"t",)), ("ucx", (b"u",)))
NAME = "pipeline-0"


def target(stages: int = 2, **changes: object) -> Target:
    model = types_pb2.ModelRef(fingerprint=REVISION)
    base = Target(CostModel(INFO, LIMITS, "float32"), stages, model, terms="terms")
    return dataclasses.replace(base, **changes)


# -- what workers, gateways and operators say ------------------------------------------------------------------------


def introduction(
    name: str,
    life: int = 1,
    pool: int = -1,
    tp: int = 1,
    *,
    transports: Iterable[tuple[str, Sequence[bytes]]] = BOTH,
    memory_bytes: int = 0,
    flops_per_s: float = 1e11,
    bytes_per_s: float = 1e10,
    device_name: str = "",
    **changes: Any,
) -> pb.RegisterRequest:
    """A worker's, of `tp` ranks."""
    rates = types_pb2.DeviceInfo(
        kind="cpu", name=device_name, memory_bytes=memory_bytes, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s
    )
    open_ = [types_pb2.TransportEndpoints(name=n, rank_addresses=[*a] * tp) for n, a in transports]
    fields = {"protocol": PROTOCOL, "address": f"{name}:1", "tp_size": tp, "device": rates, "transports": open_}
    return pb.RegisterRequest(worker_id=name, incarnation=life, pool=pool, **fields | changes)


def held(name: str, epoch: int, plan: v.StagePlan, *, active: bool = True) -> pb.HeldAssignment:
    """What a worker reports of a stage that it holds."""
    return pb.HeldAssignment(
        pipeline_id=name, epoch=epoch, stage=plan.stage, layers=v.layer_range(plan.layers),
        generation=plan.generation, active=active, fingerprint=REVISION,
    )  # fmt: skip


def renewal(name: str, life: int = 1, late_s: float = 0.0) -> pb.KeepAliveRequest:
    return pb.KeepAliveRequest(worker_id=name, incarnation=life, late_ms=round(late_s * 1000))


def broken(name: str, life: int, pipeline: str, epoch: int, reason: str) -> pb.KeepAliveRequest:
    """A worker's renewal, which says that one of its links broke."""
    return pb.KeepAliveRequest(
        worker_id=name, incarnation=life, broken_pipeline=pipeline, broken_epoch=epoch, broken_reason=reason
    )


def stuck(
    pipeline: str, epoch: int, reason: str, unreachable: Iterable[str] = (), gateway: str = "g"
) -> pb.ReportStuckRequest:
    return pb.ReportStuckRequest(
        gateway_id=gateway, pipeline_id=pipeline, epoch=epoch, reason=reason, unreachable=unreachable
    )


def switched(gateway: str, pipeline: str, epoch: int, error: str = "") -> pb.ReportMovedRequest:
    """A gateway is at another epoch, or says why it is not."""
    return pb.ReportMovedRequest(gateway_id=gateway, pipeline_id=pipeline, epoch=epoch, error=error)


def left(gateway: str, pipeline: str) -> pb.ReportLeftRequest:
    return pb.ReportLeftRequest(gateway_id=gateway, pipeline_id=pipeline)


def measured(pipeline: str, epoch: int, *milliseconds: float) -> pb.ReportStepsRequest:
    """What a step takes on each stage."""
    step_us = [round(ms * 1000) for ms in milliseconds]
    return pb.ReportStepsRequest(gateway_id="g", pipeline_id=pipeline, epoch=epoch, step_us=step_us)


def drain(name: str, *, force: bool = True) -> pb.DrainRequest:
    return pb.DrainRequest(worker_id=name, force=force)


def undrain(name: str) -> pb.UndrainRequest:
    return pb.UndrainRequest(worker_id=name)


def scale(stage: int, replicas: int) -> pb.ScaleRequest:
    return pb.ScaleRequest(stage=stage, replicas=replicas)


def repartition(*counts: int) -> pb.RepartitionRequest:
    return pb.RepartitionRequest(counts=counts)


# -- orders, and what workers answer ---------------------------------------------------------------------------------

ORDERS = {
    "assign": stage_pb2.AssignRequest,
    "link": stage_pb2.ConnectLinkRequest,
    "activate": stage_pb2.ActivateRequest,
}


def order(what: str, pipeline: str, epoch: int, stage: int, copy: types_pb2.KvCopy | None = None) -> v.Order:
    """One whose answer comes, whether it was given or not."""
    key = stage_pb2.PipelineKey(pipeline_id=pipeline, epoch=epoch)
    if what == "link":
        offer = v.Order(pb.RegisterRequest(), stage_pb2.OfferLinkRequest(key=key, copy=copy))
        return v.Order(pb.RegisterRequest(), stage_pb2.ConnectLinkRequest(key=key, stage=stage, copy=copy), offer)
    return v.Order(pb.RegisterRequest(), ORDERS[what](key=key, stage=stage))


def loaded(
    pipeline: str, epoch: int, stage: int, pages: int = 4, *, revision: str = REVISION, layout: str = ""
) -> events.Answered:
    done = stage_pb2.AssignDone(
        num_pages=pages, weight_bytes=10, tensor_bytes_read=20, fingerprint=revision, kv_layout=layout
    )
    return events.Answered(order("assign", pipeline, epoch, stage), stage_pb2.AssignResponse(done=done))


def linked(
    pipeline: str, epoch: int, stage: int, route: str = "tcp", copy: types_pb2.KvCopy | None = None
) -> events.Answered:
    return events.Answered(order("link", pipeline, epoch, stage, copy), stage_pb2.ConnectLinkResponse(route=route))


def activated(pipeline: str, epoch: int, stage: int) -> events.Answered:
    return events.Answered(order("activate", pipeline, epoch, stage), stage_pb2.ActivateResponse())


def is_awaited(action: actions.Action) -> bool:
    """Whether it is an order whose answer leads on."""
    return isinstance(action, v.Order) and not isinstance(action.request, stage_pb2.ReleaseRequest)


def done(order: v.Order, pages: int = 4, *, layout: str = "") -> events.Answered:
    """The answer of a worker that does what it was told. It has `pages` for all pipelines together."""
    match order.request:
        case stage_pb2.ConnectLinkRequest():
            return events.Answered(order, stage_pb2.ConnectLinkResponse(route="tcp"))
        case stage_pb2.ActivateRequest():
            return events.Answered(order, stage_pb2.ActivateResponse())
        case stage_pb2.AssignRequest(limits=limits):
            pages //= max(1, limits.pipelines)
    held = stage_pb2.AssignDone(
        num_pages=pages, weight_bytes=10, tensor_bytes_read=20, fingerprint=REVISION, kv_layout=layout
    )
    return events.Answered(order, stage_pb2.AssignResponse(done=held))


class Story:
    """The core with a clock, and the workers' answers as a test wants them."""

    def __init__(self, goal: Target | None = None, record: Record | None = None) -> None:
        self.now = 100.0
        self.world = World(goal or target(), now=self.now, nonce=nonces(1).__next__, timing=TIMING, record=record)
        self.actions: list[actions.Action] = []
        self.written = self.world.record.copy()
        """What another coordinator would find."""
        self.lives: Counter[str] = Counter()

    def send(self, event: events.Event) -> list[actions.Action]:
        """One event; its actions are kept too."""
        ordered = handle(self.world, event, self.now)
        self.actions += ordered
        for action in ordered:
            if isinstance(action, actions.Save):
                assert action is ordered[0], "nothing is told to anybody before it is written down"
                assert action.before == self.written
                self.written = action.after
        return ordered

    def took(self, kind: type) -> list[Any]:
        """Actions of a kind, or orders with a request of a kind, since last asked; and forgets all actions."""
        found = [a for a in self.actions if isinstance(a.request if isinstance(a, v.Order) else a, kind)]
        self.actions.clear()
        return found

    def join(self, name: str, pool: int = -1, tp: int = 1, *, same_life: bool = False, **changes: object) -> None:
        if not same_life:
            self.lives[name] += 1
        self.send(introduction(name, self.lives[name], pool, tp, **changes))

    def lose(self, name: str) -> None:
        self.send(events.WorkerLost(name, self.lives[name], "its keep-alive stream ended"))

    def load(self, stage: int, *, pages: int = 4, revision: str = REVISION, epoch: int | None = None) -> None:
        self.send(loaded(NAME, self.epoch if epoch is None else epoch, stage, pages, revision=revision))

    def link(self, stage: int, epoch: int | None = None) -> None:
        """The link behind a stage stands; behind the last but one, the tokens' link from last to first does, too."""
        at = (NAME, self.epoch if epoch is None else epoch)
        stages = len(self.pipeline.stages)
        if stage == stages - 2:
            self.send(linked(*at, stages - 1, "shared memory"))
        self.send(linked(*at, stage, "shared memory"))

    def ack(self, stage: int, epoch: int | None = None) -> None:
        self.send(activated(NAME, self.epoch if epoch is None else epoch, stage))

    def prepared(self, name: str, *, revision: str = REVISION, failed: str = "", final: bool = True) -> None:
        """A standby has loaded what it was told to, or could not."""
        told = self.preparing(name)
        if failed:
            self.send(events.Failed(told, failed, final))
        else:
            held = stage_pb2.AssignDone(fingerprint=revision)
            self.send(events.Answered(told, stage_pb2.AssignResponse(done=held)))

    def preparing(self, name: str) -> v.Order:
        """What a worker was told to load."""
        layers = v.layer_range(self.world.workers[name].preparing or (0, 0))
        return v.Order(introduction(name, self.lives[name]), stage_pb2.PrepareRequest(layers=layers))

    def fail(self, stage: int, what: str, reason: str = "boom", **flags: bool) -> None:
        self.send(events.Failed(order(what, NAME, self.epoch, stage), reason, **flags))

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
        self.send(pb.WatchPipelinesRequest(gateway_id=name, protocol=PROTOCOL))

    def prepare_move(self, *, layout: str = "") -> None:
        """The next epoch's workers do what they are told, until gateways are."""
        move = self.move
        assert move is not None
        for stage in range(len(move.stages)):
            self.send(loaded(NAME, move.epoch, stage, layout=layout))
        for link in self.took(stage_pb2.ConnectLinkRequest):
            assert link.request.key.epoch == move.epoch
            self.send(done(link))
        for stage in range(len(move.stages)):
            self.send(activated(NAME, move.epoch, stage))

    def moved(self, gateway: str = "g", error: str = "") -> None:
        """A gateway has switched, or says why it could not."""
        assert self.move is not None
        self.send(switched(gateway, NAME, self.move.epoch, error))

    def wait(self, seconds: float, *alive: str) -> None:
        """Time passes in ticks of 50 ms; `alive` workers renew."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            for name in alive:
                self.send(renewal(name, self.lives[name]))
            self.send(events.Tick())

    def check_scale(self, stage: int, replicas: int) -> int:
        return check_scale(self.world, stage, replicas, self.now)

    @property
    def pipelines(self) -> dict[str, Pipeline]:
        return self.world.pipelines

    @property
    def pipeline(self) -> Pipeline:
        return self.world.pipelines[NAME]

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
