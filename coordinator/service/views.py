"""Converts the core's values to the messages that gateways and operators get."""

from __future__ import annotations

from collections.abc import Iterator

from stagemesh.protos.v1 import coordinator_pb2, types_pb2

from ..values import Loaded, layer_range
from ..world.pipeline import Attempt, Phase, Pipeline, State
from ..world.worker import Worker
from ..world.world import World


def pipeline_view(world: World, pipeline: Pipeline) -> types_pb2.PipelineView:
    """The view of one pipeline."""
    view = types_pb2.PipelineView(
        pipeline_id=pipeline.pipeline_id,
        epoch=pipeline.epoch,
        state=pipeline.state.value,
        reason=pipeline.reason,
        final=pipeline.state is State.DOWN and pipeline.final,
        model=world.settings.model,
        limits=world.settings.limits,
        leaving=pipeline.leaving is not None,
    )
    view.limits.pipelines = pipeline.main.shares if pipeline.main is not None else 1
    view.stages.extend(_stage_views(world, pipeline.main))
    move = pipeline.beside
    if move is not None and move.phase is Phase.SWITCH:
        view.next.epoch, view.next.pipelines = move.epoch, move.shares
        view.next.stages.extend(_stage_views(world, move))
        view.next.copies.extend(move.copies)
    return view


def _stage_views(world: World, attempt: Attempt | None) -> Iterator[types_pb2.StageView]:
    for plan in attempt.stages if attempt is not None else ():
        assert attempt is not None
        worker = world.workers.get(plan.worker_id)
        info = worker.info if worker else world.lost.get(plan.worker_id)
        loaded = attempt.loaded.get(plan.stage, Loaded(0))
        yield types_pb2.StageView(
            stage=plan.stage,
            worker_id=plan.worker_id,
            address=info.address if info else "",
            layers=layer_range(plan.layers),
            tp_size=info.tp_size if info else 0,
            generation=plan.generation,
            num_pages=loaded.num_pages,
            device=info.device if info else None,
            route=attempt.routes.get(plan.stage, ""),
            weight_bytes=loaded.weight_bytes,
            tensor_bytes_read=loaded.tensor_bytes_read,
            protocol=info.protocol if info else 0,
        )


def mesh_view(world: World) -> types_pb2.MeshView:
    """The view of the whole mesh."""
    view = types_pb2.MeshView(pipelines=[pipeline_view(world, p) for p in world.pipelines.values()])
    view.wanted_counts.extend(last - first for first, last in world.wanted_ranges or ())
    view.given_up = world.given_up
    for name, pipeline in world.pipelines.items():
        for outcome in pipeline.steps.outcomes:
            view.rebalances.add(
                pipeline_id=name,
                epoch=outcome.epoch,
                before_us=round(outcome.before_s * 1e6),
                expected_us=round(outcome.expected_s * 1e6),
                after_us=round(outcome.after_s * 1e6),
            )
    view.advice.extend(world.advices)
    for worker in world.workers.values():
        view.workers.append(_worker_view(world, worker))
    for info in world.lost.values():
        view.workers.append(_introduced(info, "lost"))
    for counts in world.stale_refused.values():
        for kind, count in counts.items():
            view.stale_refused[kind] += count
    return view


def _worker_view(world: World, worker: Worker) -> types_pb2.WorkerView:
    info, layers = worker.info, worker.kept or worker.preparing
    state = "standby" if worker.kept or not worker.preparing else "loading"
    for pipeline in world.pipelines.values():
        stage = pipeline.stage_of(info.worker_id)
        if stage is not None and pipeline.main is not None:
            layers = pipeline.stages[stage].layers
            loads = "fetching" if worker.fetching else "loading"
            state = "holding" if stage in pipeline.main.loaded else loads
    view = _introduced(info, "draining" if world.drains(worker) else state)
    view.loaded_bytes, view.total_bytes = worker.progress
    if layers:
        view.layers.CopyFrom(layer_range(layers))
    return view


def _introduced(info: coordinator_pb2.RegisterRequest, state: str) -> types_pb2.WorkerView:
    return types_pb2.WorkerView(
        worker_id=info.worker_id,
        address=info.address,
        pool=info.pool,
        any_stage=info.any_stage,
        tp_size=info.tp_size,
        device=info.device,
        state=state,
        version=info.version,
    )
