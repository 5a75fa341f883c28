"""Between the core's values and the wire's messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stagemesh.protos.v1 import coordinator_pb2, types_pb2

from . import values as v
from .pipeline import Pipeline, State
from .reconfigure import Mesh

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
            v.Held(
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


def copy_message(copy: v.Copy) -> types_pb2.KvCopy:
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


def pipeline_view(mesh: Mesh, pipeline: Pipeline, model: types_pb2.ModelRef) -> types_pb2.PipelineView:
    """One pipeline as gateways see it."""
    view = types_pb2.PipelineView(
        pipeline_id=pipeline.pipeline_id,
        epoch=pipeline.epoch,
        state=STATES[pipeline.state],
        reason=pipeline.reason,
        final=pipeline.state is State.DOWN and pipeline.final,
        model=model,
        limits=limits(mesh.target.limits),
        leaving=pipeline.leaving,
    )
    view.limits.pipelines = pipeline.shares
    view.stages.extend(_stage_views(mesh, pipeline))
    move = mesh.moves.get(pipeline.pipeline_id)
    if move is not None and move.published:
        view.next.epoch, view.next.pipelines = move.epoch, move.shares
        view.next.stages.extend(_stage_views(mesh, move))
        view.next.copies.extend(copy_message(copy) for copy in move.copies)
    return view


def _stage_views(mesh: Mesh, pipeline: Pipeline) -> Iterator[types_pb2.StageView]:
    for plan in pipeline.stages:
        worker = mesh.workers.get(plan.worker_id)
        info = worker.info if worker else mesh.lost.get(plan.worker_id)
        loaded = pipeline.loaded.get(plan.stage, v.Loaded(0))
        yield types_pb2.StageView(
            stage=plan.stage,
            worker_id=plan.worker_id,
            address=info.address if info else "",
            layers=layer_range(plan.layers),
            tp_size=info.tp_size if info else 0,
            generation=plan.generation,
            num_pages=loaded.num_pages,
            device=device(info) if info else None,
            route=pipeline.routes.get(plan.stage, ""),
            weight_bytes=loaded.weight_bytes,
            tensor_bytes_read=loaded.tensor_bytes_read,
            protocol=info.protocol if info else 0,
        )


def mesh_view(
    mesh: Mesh, model: types_pb2.ModelRef, stale_refused: Mapping[str, Mapping[str, int]]
) -> types_pb2.MeshView:
    """The whole mesh. `stale_refused`: worker -> kind -> count."""
    view = types_pb2.MeshView(pipelines=[pipeline_view(mesh, p, model) for p in mesh.pipelines.values()])
    view.wanted_counts.extend(last - first for first, last in mesh.ranges or ())
    view.given_up = mesh.given_up
    for name, times in mesh.step_times.items():
        for outcome in times.outcomes:
            view.rebalances.add(
                pipeline_id=name,
                epoch=outcome.epoch,
                before_us=round(outcome.before_s * 1e6),
                expected_us=round(outcome.expected_s * 1e6),
                after_us=round(outcome.after_s * 1e6),
            )
    view.advice.extend(mesh.advices)
    for worker in mesh.workers.values():
        view.workers.append(_worker_view(mesh, worker))
    for info in mesh.lost.values():
        view.workers.add(
            worker_id=info.worker_id,
            address=info.address,
            pool=info.pool,
            any_stage=info.any_stage,
            tp_size=info.tp_size,
            device=device(info),
            state="lost",
            version=info.version,
        )
    for counts in stale_refused.values():
        for kind, count in counts.items():
            view.stale_refused[kind] += count
    return view


def _worker_view(mesh: Mesh, worker: v.Worker) -> types_pb2.WorkerView:
    info, layers = worker.info, worker.kept or worker.preparing
    state = "standby" if worker.kept or not worker.preparing else "loading"
    for pipeline in mesh.pipelines.values():
        stage = pipeline.stage_of(info.worker_id)
        if stage is not None:
            layers = pipeline.stages[stage].layers
            state = "holding" if stage in pipeline.loaded else "loading"
    return types_pb2.WorkerView(
        worker_id=info.worker_id,
        address=info.address,
        pool=info.pool,
        any_stage=info.any_stage,
        tp_size=info.tp_size,
        device=device(info),
        state="draining" if worker.draining else state,
        loaded_bytes=worker.progress.loaded_bytes,
        total_bytes=worker.progress.total_bytes,
        layers=layer_range(layers) if layers else None,
        version=info.version,
    )
