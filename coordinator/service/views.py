"""Between the core's values and the messages on the wire."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stagemesh.protos.v1 import coordinator_pb2, types_pb2

from .. import values as v
from ..world.pipeline import Attempt, Phase, Pipeline, State
from ..world.worker import Worker
from ..world.world import World

STATES = {
    State.DOWN: types_pb2.PIPELINE_STATE_DOWN,
    State.FORMING: types_pb2.PIPELINE_STATE_FORMING,
    State.SERVING: types_pb2.PIPELINE_STATE_SERVING,
    State.DRAINING: types_pb2.PIPELINE_STATE_DRAINING,
}


def worker_info(request: coordinator_pb2.RegisterRequest) -> v.WorkerInfo:
    """A worker's introduction."""
    return v.WorkerInfo(
        worker_id=request.worker_id,
        incarnation=request.incarnation,
        address=request.address,
        pool=request.pool,
        any_stage=request.any_stage,
        tp_size=request.tp_size,
        device_kind=request.device.kind,
        device_name=request.device.name,
        memory_bytes=request.device.memory_bytes,
        flops_per_s=request.device.flops_per_s,
        bytes_per_s=request.device.bytes_per_s,
        transports=tuple((t.name, tuple(t.rank_addresses)) for t in request.transports),
        held=tuple(
            v.ReportedAssignment(
                h.pipeline_id,
                h.epoch,
                h.stage,
                (h.layers.first, h.layers.last),
                h.generation,
                h.active,
                h.fingerprint,
            )
            for h in request.held
        ),
        version=request.version,
        protocol=request.protocol,
    )


def device(info: v.WorkerInfo) -> types_pb2.DeviceInfo:
    """A worker's device."""
    return types_pb2.DeviceInfo(
        kind=info.device_kind,
        name=info.device_name,
        memory_bytes=info.memory_bytes,
        flops_per_s=info.flops_per_s,
        bytes_per_s=info.bytes_per_s,
    )


def layer_range(layers: v.Range) -> types_pb2.LayerRange:
    """A layer range."""
    return types_pb2.LayerRange(first=layers[0], last=layers[1])


def copy_message(copy: v.PageCopy) -> types_pb2.KvCopy:
    """Pages that change hands."""
    return types_pb2.KvCopy(
        index=copy.index,
        from_epoch=copy.from_epoch,
        from_stage=copy.from_stage,
        to_stage=copy.to_stage,
        layers=layer_range(copy.layers),
    )


def limits(values: v.Limits) -> types_pb2.RunLimits:
    """Bounds of a pipeline."""
    return types_pb2.RunLimits(
        max_model_len=values.max_model_len,
        max_num_seqs=values.max_num_seqs,
        max_num_batched_tokens=values.max_num_batched_tokens,
        page_size=values.page_size,
        num_pages=values.num_pages,
        steps_in_flight=values.steps_in_flight,
        gateways=values.gateways,
    )


def pipeline_view(world: World, pipeline: Pipeline, model: types_pb2.ModelRef) -> types_pb2.PipelineView:
    """One pipeline as gateways see it."""
    view = types_pb2.PipelineView(
        pipeline_id=pipeline.pipeline_id,
        epoch=pipeline.epoch,
        state=STATES[pipeline.state],
        reason=pipeline.reason,
        final=pipeline.state is State.DOWN and pipeline.final,
        model=model,
        limits=limits(world.settings.limits),
        leaving=pipeline.leaving is not None,
    )
    view.limits.pipelines = pipeline.main.shares if pipeline.main is not None else 1
    view.stages.extend(_stage_views(world, pipeline.main))
    move = pipeline.beside
    if move is not None and move.phase is Phase.SWITCH:
        view.next.epoch, view.next.pipelines = move.epoch, move.shares
        view.next.stages.extend(_stage_views(world, move))
        view.next.copies.extend(copy_message(copy) for copy in move.copies)
    return view


def _stage_views(world: World, attempt: Attempt | None) -> Iterator[types_pb2.StageView]:
    for plan in attempt.stages if attempt is not None else ():
        assert attempt is not None
        worker = world.workers.get(plan.worker_id)
        info = worker.info if worker else world.lost.get(plan.worker_id)
        loaded = attempt.loaded.get(plan.stage, v.Loaded(0))
        yield types_pb2.StageView(
            stage=plan.stage,
            worker_id=plan.worker_id,
            address=info.address if info else "",
            layers=layer_range(plan.layers),
            tp_size=info.tp_size if info else 0,
            generation=plan.generation,
            num_pages=loaded.num_pages,
            device=device(info) if info else None,
            route=attempt.routes.get(plan.stage, ""),
            weight_bytes=loaded.weight_bytes,
            tensor_bytes_read=loaded.tensor_bytes_read,
            protocol=info.protocol if info else 0,
        )


def mesh_view(
    world: World, model: types_pb2.ModelRef, stale_refused: Mapping[str, Mapping[str, int]]
) -> types_pb2.MeshView:
    """The whole mesh. `stale_refused`: worker -> kind -> count."""
    view = types_pb2.MeshView(pipelines=[pipeline_view(world, p, model) for p in world.pipelines.values()])
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
    for counts in stale_refused.values():
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
            state = "holding" if stage in pipeline.main.loaded else "loading"
    view = _introduced(info, "draining" if world.drains(worker) else state)
    view.loaded_bytes, view.total_bytes = worker.progress.loaded_bytes, worker.progress.total_bytes
    if layers:
        view.layers.CopyFrom(layer_range(layers))
    return view


def _introduced(info: v.WorkerInfo, state: str) -> types_pb2.WorkerView:
    return types_pb2.WorkerView(
        worker_id=info.worker_id,
        address=info.address,
        pool=info.pool,
        any_stage=info.any_stage,
        tp_size=info.tp_size,
        device=device(info),
        state=state,
        version=info.version,
    )
