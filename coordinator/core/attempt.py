"""The steps of an attempt: assign -> link -> activate, at one epoch.

The same functions form a pipeline, move its layers while it serves, and change its share of the pages. The attempt's
phase says what was ordered, and its fields say what was answered. So calling a function again orders nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stagemesh.protos.v1 import stage_pb2
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest
from stagemesh.protos.v1.types_pb2 import KvCopy, RunLimits

from ..observe.faults import fail
from ..planning.target import CannotForm
from ..planning.transport import rank_addresses, transport
from ..values import Holders, Order, StagePlan, layer_range
from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.world import World
from .actions import Action


def new_epoch(world: World, pipeline: Pipeline) -> int:
    """Takes a new epoch for the pipeline, higher than any before."""
    name = pipeline.pipeline_id
    epoch = max(world.record.epochs.get(name, 0) + 1, world.first_epoch)
    world.record.epochs[name] = epoch
    world.changed()
    return epoch


def plan_stages(world: World, holders: Holders) -> tuple[StagePlan, ...]:
    """Stages of a new attempt, each with a fresh generation."""
    return tuple(
        StagePlan(stage, h.worker_id, world.workers[h.worker_id].incarnation, h.layers, world.nonce())
        for stage, h in enumerate(holders)
    )


def begin(world: World, attempt: Attempt) -> Iterator[Action]:
    """Orders the workers to load their layers."""
    limits = RunLimits(pipelines=attempt.shares)
    limits.MergeFrom(world.settings.limits)
    for plan in attempt.stages:
        request = stage_pb2.AssignRequest(
            key=attempt.key,
            stage=plan.stage,
            num_stages=len(attempt.stages),
            layers=layer_range(plan.layers),
            generation=plan.generation,
            model=world.settings.model,
            limits=limits,
            beside=attempt.beside,
        )
        yield Order(world.workers[plan.worker_id].info, request)


def advance(world: World, pipeline: Pipeline, attempt: Attempt, now: float) -> Iterator[Action]:
    """The orders that follow from the answers so far."""
    if attempt.phase is Phase.ASSIGN and len(attempt.loaded) == len(attempt.stages):
        _enter(world, pipeline, attempt, Phase.LINK)
        try:
            links = [_stage_link(world, attempt, stage) for stage in range(attempt.num_links)]
            links += [_copy_link(world, pipeline, attempt, copy) for copy in attempt.copies]
        except CannotForm as e:
            fail(world, attempt, e.reason, now, pause=True)
        else:
            yield from links
    links_up = len(attempt.routes) + len(attempt.copied)
    if attempt.phase is Phase.LINK and not attempt.fault and links_up == attempt.num_links + len(attempt.copies):
        _enter(world, pipeline, attempt, Phase.ACTIVATE)
        for plan in attempt.stages:
            request = stage_pb2.ActivateRequest(key=attempt.key, stage=plan.stage)
            yield Order(world.workers[plan.worker_id].info, request)


def _enter(world: World, pipeline: Pipeline, attempt: Attempt, phase: Phase) -> None:
    attempt.phase = phase
    if not attempt.beside:
        pipeline.reason = phase.value
    world.publish()


def _stage_link(world: World, attempt: Attempt, stage: int) -> Order:
    to = (stage + 1) % len(attempt.stages)
    sender, receiver = (world.worker_at(attempt, s).info for s in (stage, to))
    return _link(world, attempt, (sender, stage), (receiver, to), tokens=to == 0)


def _copy_link(world: World, pipeline: Pipeline, attempt: Attempt, copy: KvCopy) -> Order:
    assert pipeline.main is not None
    sender = world.worker_at(pipeline.main, copy.from_stage).info
    receiver = world.worker_at(attempt, copy.to_stage).info
    theirs, ours = pipeline.main.loaded[copy.from_stage].kv_layout, attempt.loaded[copy.to_stage].kv_layout
    if theirs != ours or sender.tp_size != receiver.tp_size:
        raise CannotForm(
            f"worker {receiver.worker_id} ({ours}, {receiver.tp_size} ranks) cannot take KV pages of "
            f"{sender.worker_id} ({theirs}, {sender.tp_size} ranks)"
        )
    return _link(world, attempt, (sender, copy.from_stage), (receiver, copy.to_stage), copy=copy)


def _link(
    world: World,
    attempt: Attempt,
    sends: tuple[RegisterRequest, int],
    receives: tuple[RegisterRequest, int],
    *,
    tokens: bool = False,
    copy: KvCopy | None = None,
) -> Order:
    """A link between two workers, each given with its stage."""
    (sender, stage), (receiver, to) = sends, receives
    failed = world.ucx_failure(sender, receiver)
    name, warning = transport(world.settings.transport, sender, receiver, ucx_failed=failed)
    if warning and not tokens:  # The link for tokens would repeat the warning.
        world.log(warning, warning=True)
    # For tokens there is one link: rank 0 passes them to the other ranks.
    nonces = [world.nonce() for _ in range(1 if tokens else receiver.tp_size)]
    both: dict[str, Any] = {"key": attempt.key, "transport": name, "nonces": nonces, "tokens": tokens, "copy": copy}
    offer = stage_pb2.OfferLinkRequest(stage=to, sender_addresses=rank_addresses(sender, name), **both)
    connect = stage_pb2.ConnectLinkRequest(stage=stage, receiver_id=receiver.worker_id, **both)
    return Order(sender, connect, Order(receiver, offer))


def page_copies(old: Sequence[StagePlan], new: Sequence[StagePlan], epoch: int) -> tuple[KvCopy, ...]:
    """The KV pages that must go from worker to worker when the stages change. `epoch` is the old epoch."""
    found: list[KvCopy] = []
    for to in new:
        for source in old:
            first, last = max(to.layers[0], source.layers[0]), min(to.layers[1], source.layers[1])
            if first < last and source.worker_id != to.worker_id:
                found.append(
                    KvCopy(
                        index=len(found),
                        from_epoch=epoch,
                        from_stage=source.stage,
                        to_stage=to.stage,
                        layers=layer_range((first, last)),
                    )
                )
    return tuple(found)


def release(
    world: World, attempt: Attempt, reason: str, *, keep: Sequence[str] = (), alone: bool = False
) -> Iterator[Action]:
    """Tells the attempt's workers, except those in `keep`, that it ended. `alone`: releases no earlier epoch."""
    for plan in attempt.stages:
        if plan.worker_id not in keep and world.knows(plan.worker_id, plan.incarnation):
            request = stage_pb2.ReleaseRequest(key=attempt.key, reason=reason, alone=alone)
            yield Order(world.workers[plan.worker_id].info, request)
