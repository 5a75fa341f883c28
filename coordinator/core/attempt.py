"""How an attempt begins, goes on and ends: assign -> link -> activate, at one epoch.

The same functions serve a pipeline that is formed, one whose layers move beside serving, and one that gets another
share of the pages. What was ordered is the attempt's phase; what was answered is in its fields. So whatever is called
again orders nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..observe.faults import fail_beside, interrupt
from ..planning.target import CannotForm
from ..planning.transport import transport
from ..values import Holders, PageCopy, Range, StagePlan, WorkerInfo
from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.worker import Progress, Worker
from ..world.world import World
from . import actions
from .actions import Action


def new_epoch(world: World, pipeline: Pipeline) -> int:
    """An epoch that the pipeline never had."""
    name = pipeline.pipeline_id
    epoch = max(world.record.epochs.get(name, 0) + 1, world.first_epoch)
    world.record.epochs[name] = epoch
    world.changed()
    return epoch


def plan_stages(world: World, holders: Holders) -> tuple[StagePlan, ...]:
    """Stages of a new attempt, each with a fresh generation."""
    return tuple(
        StagePlan(stage, h.worker_id, world.workers[h.worker_id].info.incarnation, h.layers, world.nonce())
        for stage, h in enumerate(holders)
    )


def begin(world: World, attempt: Attempt) -> Iterator[Action]:
    """Orders the workers to hold their layers."""
    for plan in attempt.stages:
        address = world.worker_at(attempt, plan.stage).info.address
        stages = len(attempt.stages)
        yield actions.Assign(
            attempt.pipeline_id, attempt.epoch, stages, plan, address, attempt.shares, beside=attempt.beside
        )


def take_stage(worker: Worker, layers: Range) -> None:
    """A worker is to hold layers instead of whatever it has loaded."""
    worker.progress, worker.preparing, worker.beside = Progress(), None, None
    if worker.kept != layers:
        worker.kept = None


def advance(world: World, pipeline: Pipeline, attempt: Attempt, now: float) -> Iterator[Action]:
    """The orders that follow from the answers so far."""
    if attempt.phase is Phase.ASSIGN and len(attempt.loaded) == len(attempt.stages):
        yield from _link(world, pipeline, attempt, now)
    links = len(attempt.routes) + len(attempt.copied)
    if attempt.phase is Phase.LINK and not attempt.fault and links == attempt.num_links + len(attempt.copies):
        _enter(world, pipeline, attempt, Phase.ACTIVATE)
        for plan in attempt.stages:
            address = world.worker_at(attempt, plan.stage).info.address
            yield actions.Activate(attempt.pipeline_id, attempt.epoch, plan.stage, address)


def _enter(world: World, pipeline: Pipeline, attempt: Attempt, phase: Phase) -> None:
    attempt.phase = phase
    if not attempt.beside:
        pipeline.reason = phase.value
    world.publish()


def _link(world: World, pipeline: Pipeline, attempt: Attempt, now: float) -> Iterator[Action]:
    _enter(world, pipeline, attempt, Phase.LINK)
    try:
        links = [_stage_link(world, attempt, stage) for stage in range(attempt.num_links)]
        links += [_copy_link(world, pipeline, attempt, copy) for copy in attempt.copies]
    except CannotForm as e:
        if attempt.beside:
            fail_beside(world, attempt, e.reason, now)
        else:
            interrupt(world, pipeline, e.reason, now, world.timing.retry_max_s)
    else:
        yield from links


def _stage_link(world: World, attempt: Attempt, stage: int) -> actions.MakeLink:
    to = (stage + 1) % len(attempt.stages)
    sender, receiver = (world.worker_at(attempt, s).info for s in (stage, to))
    # Of the same two workers a warning was said already.
    name = _transport(world, sender, receiver, quiet=to == 0)
    return actions.MakeLink(
        attempt.pipeline_id,
        attempt.epoch,
        stage,
        name,
        sender.address,
        receiver.address,
        receiver.worker_id,
        sender.addresses(name) or (),
        tuple(world.nonce() for _ in range(receiver.tp_size if to else 1)),
        to,
        tokens=to == 0,
    )


def _copy_link(world: World, pipeline: Pipeline, attempt: Attempt, copy: PageCopy) -> actions.MakeLink:
    assert pipeline.main is not None
    sender = world.worker_at(pipeline.main, copy.from_stage).info
    receiver = world.worker_at(attempt, copy.to_stage).info
    theirs, ours = pipeline.main.loaded[copy.from_stage].kv_layout, attempt.loaded[copy.to_stage].kv_layout
    if theirs != ours or sender.tp_size != receiver.tp_size:
        raise CannotForm(
            f"worker {receiver.worker_id} ({ours}, {receiver.tp_size} ranks) cannot take KV pages of "
            f"{sender.worker_id} ({theirs}, {sender.tp_size} ranks)"
        )
    name = _transport(world, sender, receiver, quiet=False)
    return actions.MakeLink(
        attempt.pipeline_id,
        attempt.epoch,
        copy.from_stage,
        name,
        sender.address,
        receiver.address,
        receiver.worker_id,
        sender.addresses(name) or (),
        tuple(world.nonce() for _ in range(receiver.tp_size)),
        copy.to_stage,
        copy=copy,
    )


def _transport(world: World, sender: WorkerInfo, receiver: WorkerInfo, *, quiet: bool) -> str:
    failed = world.ucx_failure(sender, receiver)
    name, warning = transport(world.settings.transport, sender, receiver, ucx_failed=failed)
    if warning and not quiet:
        world.log(warning, warning=True)
    return name


def page_copies(old: Sequence[StagePlan], new: Sequence[StagePlan], epoch: int) -> tuple[PageCopy, ...]:
    """What has to go from worker to worker when the stages change; `epoch` is the old one's."""
    found: list[PageCopy] = []
    for to in new:
        for source in old:
            first, last = max(to.layers[0], source.layers[0]), min(to.layers[1], source.layers[1])
            if first < last and source.worker_id != to.worker_id:
                found.append(PageCopy(len(found), epoch, source.stage, to.stage, (first, last)))
    return tuple(found)


def release(
    world: World, attempt: Attempt, reason: str, *, keep: Sequence[str] = (), alone: bool = False
) -> Iterator[Action]:
    """Tells the attempt's workers outside `keep` that it ended; `alone`: that epoch, and none before it."""
    for plan in attempt.stages:
        if plan.worker_id not in keep and world.knows(plan.worker_id, plan.incarnation):
            address = world.workers[plan.worker_id].info.address
            yield actions.Release(attempt.pipeline_id, attempt.epoch, plan.worker_id, address, reason, alone)
