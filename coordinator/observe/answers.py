"""What workers answered to orders, in the world. An answer to an epoch that has passed changes nothing."""

from __future__ import annotations

from ..values import Loaded
from ..world.pipeline import Attempt, Phase, Pipeline
from ..world.worker import Progress
from ..world.world import World
from . import events
from .faults import backoff_s, fail_beside, interrupt

Answer = events.AssignProgress | events.AssignDone | events.LinkUp | events.Activated | events.StepFailed


def answered(world: World, event: Answer, now: float) -> None:
    """An answer to Assign, MakeLink or Activate."""
    pipeline = world.pipelines.get(event.pipeline_id)
    attempt = pipeline.at(event.epoch) if pipeline is not None else None
    if pipeline is None or attempt is None or not attempt.is_being_made:
        return
    match event:
        case events.AssignProgress() if attempt.phase is Phase.ASSIGN:
            world.worker_at(attempt, event.stage).progress = Progress(event.loaded_bytes, event.total_bytes)
            world.publish(urgent=False)
        case events.AssignDone() if attempt.phase is Phase.ASSIGN:
            _loaded(world, pipeline, attempt, event.stage, event.loaded, now)
        case events.LinkUp() if attempt.phase is Phase.LINK:
            if event.copy is not None:
                attempt.copied.add(event.copy)
            else:
                attempt.routes[event.stage] = event.route
            world.changed()
        case events.Activated() if attempt.phase is Phase.ACTIVATE:
            attempt.activated.add(event.stage)
            world.changed()
        case events.StepFailed():
            _failed(world, pipeline, attempt, event, now)


def _loaded(world: World, pipeline: Pipeline, attempt: Attempt, stage: int, loaded: Loaded, now: float) -> None:
    worker, plan = world.worker_at(attempt, stage), attempt.stages[stage]
    worker.kept = plan.layers
    key = plan.worker_id, plan.incarnation
    world.pages[key] = max(world.pages.get(key, 0), loaded.num_pages * attempt.shares)
    world.changed()
    if refusal := _why_refused(world, attempt, loaded):
        _refuse(world, pipeline, attempt, stage, refusal, now)
        return
    worker.progress.loaded_bytes = worker.progress.total_bytes
    attempt.loaded[stage] = loaded
    world.publish(urgent=False)


def _why_refused(world: World, attempt: Attempt, loaded: Loaded) -> str:
    target = world.settings
    if loaded.fingerprint != target.fingerprint:
        agree = [attempt.stages[stage].worker_id for stage in sorted(attempt.loaded)]
        others = f"the coordinator and {', '.join(agree)} have" if agree else "the coordinator has"
        return (
            f"read revision {loaded.fingerprint[:12] or '(none)'} of the checkpoint, "
            f"{others} {target.fingerprint[:12]}: give all of them the same files"
        )
    need, have, page = target.limits.pages_per_sequence, loaded.num_pages, target.limits.page_size
    if have < need:
        return (
            f"has {have} KV pages of {page} tokens; one sequence of --max-model-len {target.limits.max_model_len} "
            f"needs {need}: use --max-model-len {have * page}, more KV memory (--kv-cache-gib), or more stages"
        )
    return ""


def _failed(world: World, pipeline: Pipeline, attempt: Attempt, event: events.StepFailed, now: float) -> None:
    if attempt.beside:
        fail_beside(world, attempt, f"stage {event.stage}: {event.what}: {event.reason}", now)
        return
    if event.what == "link" and event.transport_failed:
        ends = [attempt.stages[s] for s in (event.stage, (event.stage + 1) % len(attempt.stages))]
        beliefs = world.beliefs
        beliefs.ucx_failed.setdefault(frozenset(end.incarnation for end in ends), []).append(event.reason)
        beliefs.apart[frozenset(end.worker_id for end in ends)] = now + world.timing.apart_s
    if event.final:
        _refuse(world, pipeline, attempt, event.stage, f"cannot {event.what}: {event.reason}", now)
    else:
        reason = f"stage {event.stage}: {event.reason}"
        interrupt(world, pipeline, reason, now, backoff_s(world, pipeline, now))


def _refuse(world: World, pipeline: Pipeline, attempt: Attempt, stage: int, reason: str, now: float) -> None:
    """What failed would fail again: the worker is not asked for the same soon."""
    delay_s = 0.0
    if attempt.shares > 1:
        # A smaller share may be all that is wrong with it. If not, it is refused when it is asked for the whole.
        world.share_limit = attempt.shares - 1
        world.given_up = f"{world.share_limit} pipeline(s), and no more: stage {stage}: {reason}"
        world.log(world.given_up, warning=True)
        delay_s = backoff_s(world, pipeline, now)
    else:
        worker = world.worker_at(attempt, stage)
        reason = f"worker {worker.info.worker_id} {reason}"
        worker.refuse(stage, attempt.stages[stage].layers, reason, now + world.timing.refused_s)
    world.membership_changed()
    if attempt.beside:
        fail_beside(world, attempt, f"stage {stage}: {reason}", now)
    else:
        interrupt(world, pipeline, f"stage {stage}: {reason}", now, delay_s)


def prepared(world: World, event: events.Prepared | events.PrepareFailed, now: float) -> None:
    """A worker has loaded layers that it may have to hold later, or could not."""
    worker = world.workers.get(event.worker_id)
    if worker is None or worker.info.incarnation != event.incarnation or worker.preparing != event.layers:
        return  # It was given a stage meanwhile.
    worker.preparing = None
    world.changed()
    world.publish()
    name, layers = event.worker_id, f"layers {event.layers[0]}-{event.layers[1] - 1}"
    if isinstance(event, events.Prepared) and event.fingerprint == world.settings.fingerprint:
        if world.pipelines_of(name):
            worker.beside = event.layers
        else:
            worker.kept = event.layers
        world.log(f"worker {name} has {layers} ready")
        return
    final = isinstance(event, events.Prepared) or event.final
    what = "it has another revision of the checkpoint" if isinstance(event, events.Prepared) else event.reason
    reason = f"worker {name} {'cannot load' if final else 'has not loaded'} {layers}: {what}"
    world.log(reason, warning=True)
    if final:
        for pipeline in world.pipelines.values():
            for plan in pipeline.stages:
                if plan.layers == event.layers:
                    worker.refuse(plan.stage, plan.layers, reason, now + world.timing.refused_s)
    else:
        worker.prepare_after = now + world.timing.retry_max_s
    if event.layers in (world.wanted_ranges or ()):
        world.load_failures += 1
        world.cannot_load = reason
        world.load_fails_for_good |= final
