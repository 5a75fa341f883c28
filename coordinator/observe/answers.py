"""Applies workers' answers to orders to the world. An answer for an epoch that has passed changes nothing."""

from __future__ import annotations

from stagemesh.planning.limits import pages_per_sequence
from stagemesh.protos.v1 import stage_pb2

from ..policy.ranges import LOADS
from ..values import Loaded, Order, span
from ..world.pipeline import Attempt, Phase
from ..world.world import World
from .events import Answered, Failed
from .faults import fail


def answered(world: World, event: Answered, now: float) -> None:
    """A worker answered an order."""
    order, response = event.order, event.response
    if isinstance(order.request, stage_pb2.PrepareRequest):
        if isinstance(response, stage_pb2.AssignResponse) and response.HasField("done"):
            another = response.done.fingerprint != world.settings.model.fingerprint
            _prepared(world, order, "it has another revision of the checkpoint" if another else "", another, now)
        return
    attempt = _awaiting(world, order)
    if attempt is None:
        return
    match order.request, response, attempt.phase:
        case stage_pb2.AssignRequest(stage=stage), stage_pb2.AssignResponse(), Phase.ASSIGN:
            if response.HasField("done"):
                _loaded(world, attempt, stage, response.done, now)
            else:
                worker = world.worker_at(attempt, stage)
                worker.progress, worker.fetching = (response.loaded_bytes, response.total_bytes), response.fetching
                world.publish(urgent=False)
        case stage_pb2.ConnectLinkRequest() as link, stage_pb2.ConnectLinkResponse(route=route), Phase.LINK:
            if link.HasField("copy"):
                attempt.copied.add(link.copy.index)
            else:
                attempt.routes[link.stage] = route or link.transport
            world.changed()
        case stage_pb2.ActivateRequest(stage=stage), _, Phase.ACTIVATE:
            attempt.activated.add(stage)
            world.changed()


def _awaiting(world: World, order: Order) -> Attempt | None:
    """The attempt that waits for the order's answer, if there still is one."""
    attempt = world.attempt(*order.attempt) if order.attempt is not None else None
    return attempt if attempt is not None and attempt.is_being_made else None


def _loaded(world: World, attempt: Attempt, stage: int, done: stage_pb2.AssignDone, now: float) -> None:
    worker, plan = world.worker_at(attempt, stage), attempt.stages[stage]
    worker.kept = plan.layers
    life = plan.worker_id, plan.incarnation
    world.pages[life] = max(world.pages.get(life, 0), done.num_pages * attempt.shares)
    world.changed()
    if refusal := _why_refused(world, attempt, done):
        _refuse(world, attempt, stage, refusal, now)
        return
    total_bytes = worker.progress[1]
    worker.progress, worker.fetching = (total_bytes, total_bytes), False
    attempt.loaded[stage] = Loaded(
        done.num_pages, done.weight_bytes, done.tensor_bytes_read, done.fingerprint, done.kv_layout
    )
    world.publish(urgent=False)


def _why_refused(world: World, attempt: Attempt, done: stage_pb2.AssignDone) -> str:
    limits, revision = world.settings.limits, world.settings.model.fingerprint
    if done.fingerprint != revision:
        agree = [attempt.stages[stage].worker_id for stage in sorted(attempt.loaded)]
        others = f"the coordinator and {', '.join(agree)} have" if agree else "the coordinator has"
        return (
            f"read revision {done.fingerprint[:12] or '(none)'} of the checkpoint, "
            f"{others} {revision[:12]}: give all of them the same files"
        )
    need, have, page = pages_per_sequence(limits), done.num_pages, limits.page_size
    if have < need:
        return (
            f"has {have} KV pages of {page} tokens; one sequence of --max-model-len {limits.max_model_len} "
            f"needs {need}: use --max-model-len {have * page}, more KV memory (--kv-cache-gib), or more stages"
        )
    return ""


def failed(world: World, event: Failed, now: float) -> None:
    """An order failed."""
    order, request = event.order, event.order.request
    if isinstance(request, stage_pb2.PrepareRequest):
        _prepared(world, order, event.reason, event.final, now)
    elif isinstance(request, stage_pb2.ReleaseRequest):
        world.log(f"worker {order.to.worker_id} did not take its release: {event.reason}")
    elif (attempt := _awaiting(world, order)) is None:
        return
    elif attempt.beside:
        fail(world, attempt, f"stage {request.stage}: {order.what}: {event.reason}", now)
    else:
        if event.transport_failed and order.what == "link":
            ends = [attempt.stages[s] for s in (request.stage, (request.stage + 1) % len(attempt.stages))]
            beliefs = world.beliefs
            beliefs.ucx_failed.setdefault(frozenset(end.incarnation for end in ends), []).append(event.reason)
            beliefs.apart[frozenset(end.worker_id for end in ends)] = now + world.timing.apart_s
        if event.final:
            _refuse(world, attempt, request.stage, f"cannot {order.what}: {event.reason}", now)
        else:
            fail(world, attempt, f"stage {request.stage}: {event.reason}", now, pause=True)


def _refuse(world: World, attempt: Attempt, stage: int, reason: str, now: float) -> None:
    """An order failed and would fail again, so the worker is not asked for the same for a while."""
    if attempt.shares > 1:
        # Perhaps only the share was too small. If not, the attempt with all pages fails, and that is a refusal.
        world.share_limit = attempt.shares - 1
        world.given_up = f"{world.share_limit} pipeline(s) at most: stage {stage}: {reason}"
        world.log(world.given_up, warning=True)
    else:
        worker = world.worker_at(attempt, stage)
        reason = f"worker {worker.worker_id} {reason}"
        worker.refuse(stage, attempt.stages[stage].layers, reason, now + world.timing.refused_s)
    world.membership_changed()
    fail(world, attempt, f"stage {stage}: {reason}", now, pause=attempt.shares > 1)


def _prepared(world: World, order: Order, error: str, final: bool, now: float) -> None:
    """A worker has loaded layers to hold later; or it could not, because of `error`."""
    assert isinstance(order.request, stage_pb2.PrepareRequest)
    name, layers = order.to.worker_id, span(order.request.layers)
    if not world.knows(name, order.to.incarnation) or world.workers[name].preparing != layers:
        return  # It got a stage meanwhile.
    worker = world.workers[name]
    worker.preparing = None
    world.publish()
    shown = f"layers {layers[0]}-{layers[1] - 1}"
    if not error:
        if world.pipelines_of(name):
            worker.beside = layers
        else:
            worker.kept = layers
        world.log(f"worker {name} has {shown} ready")
        return
    reason = f"worker {name} {'cannot load' if final else 'has not loaded'} {shown}: {error}"
    world.log(reason, warning=True)
    if final:
        for pipeline in world.pipelines.values():
            for plan in pipeline.stages:
                if plan.layers == layers:
                    worker.refuse(plan.stage, layers, reason, now + world.timing.refused_s)
    else:
        worker.prepare_after = now + world.timing.retry_max_s
    if layers in (world.wanted_ranges or ()):
        world.load_failures += LOADS if final else 1
        world.cannot_load = reason
