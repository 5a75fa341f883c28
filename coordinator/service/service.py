"""The Coordinator service over gRPC: takes the requests, runs the core on them, and executes its actions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc.aio

from stagemesh.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from stagemesh.faults import point
from stagemesh.protocol import check_protocol
from stagemesh.protos.v1 import coordinator_pb2 as pb
from stagemesh.protos.v1 import coordinator_pb2_grpc

from ..core import actions
from ..core.mesh import handle
from ..observe import events
from ..policy.drain import check_drain
from ..policy.ranges import ranges_for
from ..policy.rebalance import advice
from ..policy.replicas import check_scale
from ..state.store import Store
from ..world.world import World
from .orders import OrderRunner
from .slots import Slots
from .views import mesh_view

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServicer):
    """The servicer. `run` must run as a task while the server runs."""

    def __init__(
        self,
        world: World,
        store: Store,
        slots: Slots,
        clock: Callable[[], float] = time.monotonic,
        is_leader: Callable[[], bool] = lambda: True,
    ) -> None:
        """`is_leader`: while it returns False, events are ignored and no orders are given."""
        self._world = world
        self._timing = world.timing
        self._store = store
        self._slots = slots
        self._clock = clock
        self._runner = OrderRunner(self.post, world.timing)
        self._streams: dict[str, object] = {}  # worker -> its newest keep-alive stream
        self._version = self._urgent = 0  # of what is published; of its last urgent change
        self._changed = asyncio.Event()
        self._stopping = False
        self._is_leader = is_leader
        self._failed: Exception | None = None

    def post(self, event: events.Event) -> None:
        """Runs the core on one event and executes its actions in order.

        If an action fails, such as a write on a full disk, the core's world is wrong: `run` raises the error, which
        ends the process.
        """
        if self._stopping or self._failed is not None or not self._is_leader():
            return
        try:
            self._execute(handle(self._world, event, self._clock()))
        except Exception as e:
            self._failed = e
            raise

    def _execute(self, ordered: Iterable[actions.Action]) -> None:
        for action in ordered:
            match action:
                case actions.Save(before, after):
                    self._store.save(before, after, self._world.settings.terms)
                case actions.Publish(urgent):
                    self._publish(urgent)
                case actions.Log(message, warning):
                    log.log(logging.WARNING if warning else logging.INFO, "%s", message)
                case _:
                    self._runner.execute(action)

    def _publish(self, urgent: bool) -> None:
        self._version += 1
        if urgent:
            self._urgent = self._version
        self._changed.set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Posts ticks until cancelled. Raises the error of any `post` that failed."""
        while self._failed is None:
            self.post(events.Tick())
            await asyncio.sleep(self._timing.tick_s)
        raise self._failed

    async def stop(self) -> None:
        """Ends orders and watches. Workers and gateways go on by themselves."""
        self._stopping = True
        self._changed.set()
        await self._runner.close()

    # Workers

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """A worker joins."""
        check_protocol(request.protocol, f"worker {request.worker_id} ({request.version})")
        for field, bad in (
            ("worker_id", not request.worker_id),
            ("incarnation", not request.incarnation),
            ("address", not request.address),
            ("tp_size", request.tp_size < 1),
            ("pool", request.pool < -1),
        ):
            if bad:
                raise InvalidRequest(f"Register: {field} is {getattr(request, field)!r}", param=field)
        stages = self._world.settings.num_stages
        if request.pool >= stages:
            raise ConfigError(
                f"worker {request.worker_id} is bound to stage {request.pool}, the pipeline has stages 0 to "
                f"{stages - 1}: start it with --stage {stages - 1} or less, or the coordinator with "
                f"-pp {request.pool + 1}"
            )
        for transport in request.transports:
            if len(transport.rank_addresses) != request.tp_size:
                raise InvalidRequest(
                    f"Register: transport {transport.name} has {len(transport.rank_addresses)} rank addresses for "
                    f"{request.tp_size} ranks",
                    param="transports",
                )
        # An older stream of this worker may break later. That must not count as a loss.
        self._streams.pop(request.worker_id, None)
        self.post(request)
        lease_s, renew_s = self._timing.lease_s, self._timing.renew_s
        return pb.RegisterResponse(lease_ms=round(lease_s * 1000), renew_ms=round(renew_s * 1000))

    async def KeepAlive(
        self, requests: AsyncIterator[pb.KeepAliveRequest], context: Context
    ) -> AsyncIterator[pb.KeepAliveResponse]:
        """Renews leases. A worker whose stream ends is lost."""
        stream = object()
        worker_id, incarnation = "", 0
        try:
            async for request in requests:
                worker_id, incarnation = request.worker_id, request.incarnation
                known = self._world.knows(worker_id, incarnation)
                if known:
                    self._streams[worker_id] = stream
                    self.post(request)
                yield pb.KeepAliveResponse(known=known)
                if not known:
                    return
        finally:
            if self._streams.get(worker_id) is stream:
                del self._streams[worker_id]
                self.post(events.WorkerLost(worker_id, incarnation, "its keep-alive stream ended"))

    # Gateways and operators

    async def WatchPipelines(
        self, request: pb.WatchPipelinesRequest, context: Context
    ) -> AsyncIterator[pb.WatchPipelinesResponse]:
        """Sends the mesh at once, then at every change. Changes that are not urgent wait up to `progress_s`."""
        if not request.gateway_id or not request.instance:
            raise InvalidRequest("WatchPipelines: gateway_id and instance must be set")
        if request.protocol:
            check_protocol(request.protocol, f"gateway {request.gateway_id}")
        if expired := self._slots.expire(self._clock()):
            # After a restart, all stored slots count as just gone.
            self._store.forget_slots(expired)
        slot = self._slots.acquire(request.gateway_id, request.instance, self._clock(), request.life)
        try:
            self._store.save_slot(slot, request.gateway_id, request.instance)
            log.info("gateway %s watches, slot %d", request.gateway_id, slot)
            self.post(request)
            sent = -1
            while not self._stopping:
                # A pipeline from before a restart may still serve: send nothing that would stop it until that is known.
                if sent != self._version and not self._world.restoring:
                    sent = self._version
                    mesh = mesh_view(self._world)
                    yield pb.WatchPipelinesResponse(slot=slot, pipelines=mesh.pipelines, mesh=mesh)
                    await self._progress_pause(sent)
                else:
                    await self._changed.wait()
        finally:
            self._slots.release(slot, self._clock())
            self.post(events.GatewayGone(request.gateway_id))

    async def _progress_pause(self, sent: int) -> None:
        """Waits for an urgent change, at most for `progress_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.progress_s):
                while self._urgent <= sent and not self._stopping:
                    await self._changed.wait()

    async def DescribeMesh(self, request: pb.DescribeMeshRequest, context: Context) -> pb.DescribeMeshResponse:
        """Returns the mesh as it is now."""
        if self._world.restoring:
            raise _just_started()
        return pb.DescribeMeshResponse(mesh=mesh_view(self._world))

    async def ReportStuck(self, request: pb.ReportStuckRequest, context: Context) -> pb.ReportStuckResponse:
        """A gateway gets no results of its steps, or does not reach a worker."""
        self.post(request)
        return pb.ReportStuckResponse()

    async def ReportMoved(self, request: pb.ReportMovedRequest, context: Context) -> pb.ReportMovedResponse:
        """A gateway has switched to the next epoch of a pipeline, or could not."""
        # A test may stop the process here: the gateway has switched, and only this call knows.
        point("coordinator.moved")
        self.post(request)
        return pb.ReportMovedResponse()

    async def Repartition(self, request: pb.RepartitionRequest, context: Context) -> pb.RepartitionResponse:
        """An operator asks for other layer ranges."""
        now, pipelines = self._clock(), self._world.pipelines.values()
        ranges = ranges_for(self._world, list(request.counts), now)
        advised = next((a for p in pipelines if (a := advice(self._world, p, now)) is not None), None)
        counts = [last - first for first, last in ranges]
        self.post(pb.RepartitionRequest(counts=counts))
        answer = pb.RepartitionResponse(counts=counts)
        if advised is not None and advised.ranges == ranges:
            answer.slowest_us, answer.expected_us = round(advised.now_s * 1e6), round(advised.then_s * 1e6)
        return answer

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleResponse:
        """An operator asks for more or fewer workers on a stage."""
        now = self._clock()
        if self._world.settles(now):
            raise _just_started()
        pipelines = check_scale(self._world, request.stage, request.replicas, now)
        self.post(request)
        return pb.ScaleResponse(pipelines=pipelines)

    async def ReportLeft(self, request: pb.ReportLeftRequest, context: Context) -> pb.ReportLeftResponse:
        """A gateway has left a pipeline."""
        self.post(request)
        return pb.ReportLeftResponse()

    async def ReportSteps(self, request: pb.ReportStepsRequest, context: Context) -> pb.ReportStepsResponse:
        """A gateway reports the time of a pipeline's steps."""
        self.post(request)
        return pb.ReportStepsResponse()

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Takes a worker out of service."""
        self._check_known(request.worker_id)
        if not request.force:
            check_drain(self._world, request.worker_id)
        pipelines = self._world.pipelines_of(request.worker_id)
        self.post(request)
        return pb.DrainResponse(pipeline_ids=pipelines)

    async def Undrain(self, request: pb.UndrainRequest, context: Context) -> pb.UndrainResponse:
        """Ends a drain."""
        if request.worker_id not in self._world.record.drains:
            self._check_known(request.worker_id)
            raise NotFound(f"worker {request.worker_id} does not drain")
        self.post(request)
        return pb.UndrainResponse()

    def _check_known(self, worker_id: str) -> None:
        """Raises NotFound for a worker that is not registered, or Unavailable if it may still come back."""
        if worker_id in self._world.workers:
            return
        if self._world.settles(self._clock()):
            raise _just_started()
        known = ", ".join(sorted(self._world.workers)) or "none"
        raise NotFound(f"no worker {worker_id!r} is registered; registered: {known}")


def _just_started() -> Unavailable:
    return Unavailable("this coordinator has just started: workers are still coming back", retry_after_s=1)
