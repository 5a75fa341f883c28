"""The worker's membership in the mesh: registration, renewals of the lease, reports of broken links, drains."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator

import stagemesh
from stagemesh import rpc
from stagemesh.errors import ConfigError, StagemeshError
from stagemesh.processes.cpu import CpuMeter
from stagemesh.protocol import OLDEST, PROTOCOL
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc
from stagemesh.settings.stage import StageSettings

from ..timing import StageTiming
from .lateness import Lateness
from .rank_group import RankGroup
from .service import Agent

log = logging.getLogger(__name__)


class Membership:
    """Keeps this worker registered while its rank group lives. Reconnects after the coordinator was away."""

    def __init__(
        self, settings: StageSettings, agent: Agent, worker_id: str, address: str, timing: StageTiming
    ) -> None:
        self._settings = settings
        self._timing = timing
        self._agent = agent
        self._worker_id = worker_id
        self._address = address
        self._channel = rpc.channel(settings.coordinator)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)
        self._task: asyncio.Task[None] | None = None
        self._carried: deque[tuple[str, int] | None] = deque()
        """The broken link that each unanswered renewal reported, or None."""
        self._protocol = PROTOCOL
        """Protocol version to use. The coordinator may run the previous release."""
        self._why = ""
        """Message of the last error, for the warning."""

    def register(self, group: RankGroup, incarnation: int) -> None:
        """Starts a background task that registers this rank group and renews its lease."""
        self._task = asyncio.create_task(self._keep(group, incarnation))

    async def leave(self) -> None:
        """Gives up the lease: the coordinator sees the stream end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def drain(self) -> None:
        """Asks the coordinator to take this worker out of service. Raises the coordinator's error, or Unavailable."""
        with rpc.mapped():
            request = coordinator_pb2.DrainRequest(worker_id=self._worker_id, force=True)
            await self._stub.Drain(request, timeout=self._timing.coordinator_call_s)

    async def stop(self) -> None:
        """Leaves and closes the channel."""
        await self.leave()
        await self._channel.close(None)

    async def _keep(self, group: RankGroup, incarnation: int) -> None:
        while True:
            every_s = await self._until_registered(group, incarnation)
            try:
                with rpc.mapped():
                    await self._renew(incarnation, every_s)
            except StagemeshError as e:
                self._why = e.message
            except Exception:
                log.exception("renewing failed; this worker registers again")
            await asyncio.sleep(self._timing.register_again_s)

    async def _until_registered(self, group: RankGroup, incarnation: int) -> float:
        """Retries until the coordinator accepts this worker. Returns the interval of renewals in seconds."""
        refused = False
        warning = asyncio.create_task(self._warn_of_silence())
        try:
            while True:
                try:
                    with rpc.mapped():
                        answer = await self._stub.Register(
                            self._introduction(group, incarnation), timeout=self._timing.coordinator_call_s
                        )
                    log.info("registered with the coordinator at %s", self._settings.coordinator)
                    self._why, every_s = "", float(answer.renew_ms) / 1000
                    return every_s
                except ConfigError as e:
                    self._why = e.message
                    self._protocol = OLDEST if self._protocol == PROTOCOL else PROTOCOL
                    if self._protocol == PROTOCOL and not refused:
                        refused = True
                        log.warning(
                            "the coordinator at %s refuses this worker: %s", self._settings.coordinator, e.message
                        )
                except StagemeshError as e:
                    self._why = e.message
                except Exception:
                    log.exception("registering failed; it is tried again")
                await asyncio.sleep(self._timing.register_again_s)
        finally:
            warning.cancel()

    async def _warn_of_silence(self) -> None:
        """Logs a warning while this worker is not registered, at growing intervals."""
        clock, pause_s = asyncio.get_running_loop().time, self._timing.silence_s
        began = clock()
        while True:
            await asyncio.sleep(pause_s)
            log.warning(
                "this worker is not registered after %.0f s: the coordinator at %s %s. The worker keeps trying. "
                "See that it runs, that --coordinator names it, and that this machine may connect to it",
                clock() - began,
                self._settings.coordinator,
                f"cannot be reached: {self._why}" if self._why else "does not answer",
            )
            pause_s = min(2 * pause_s, self._timing.silence_most_s)

    async def _renew(self, incarnation: int, every_s: float) -> None:
        """Renews the lease until the coordinator goes away or no longer knows this incarnation."""
        self._carried.clear()
        call = self._stub.KeepAlive(self._renewals(incarnation, every_s))
        try:
            async for response in call:
                if not response.known:
                    return
                # Answers come in the order of the renewals, so the coordinator now knows of this broken link.
                heard = self._carried.popleft()
                if heard is not None:
                    self._agent.broken.pop(heard, None)
        finally:
            call.cancel()
            # Wait until the call has ended, so that no two streams send renewals at once.
            await asyncio.wait([asyncio.ensure_future(call.code())], timeout=self._timing.stream_end_s)

    async def _renewals(self, incarnation: int, every_s: float) -> AsyncIterator[coordinator_pb2.KeepAliveRequest]:
        lateness = Lateness(self._timing.lateness_half_life_s, CpuMeter(os.getpid()))
        while True:
            request = coordinator_pb2.KeepAliveRequest(worker_id=self._worker_id, incarnation=incarnation)
            request.stale_refused.update(self._agent.stale_refused)
            carried = next(iter(self._agent.broken), None)
            if carried is not None:
                request.broken_pipeline, request.broken_epoch = carried
                request.broken_reason = self._agent.broken[carried]
            self._carried.append(carried)
            request.late_ms = int(lateness.note(every_s) * 1000)
            yield request
            await asyncio.sleep(every_s)

    def _introduction(self, group: RankGroup, incarnation: int) -> coordinator_pb2.RegisterRequest:
        names = set.intersection(*(set(ready.addresses) for ready in group.ready))
        request = coordinator_pb2.RegisterRequest(
            worker_id=self._worker_id,
            incarnation=incarnation,
            address=self._address,
            pool=-1 if self._settings.stage is None else self._settings.stage,
            any_stage=self._settings.any_stage,
            tp_size=group.size,
            device=group.ready[0].device,
            held=self._agent.held_assignments(),
            protocol=self._protocol,
            version=stagemesh.__version__,
        )
        for name in sorted(names):
            request.transports.add(name=name, rank_addresses=[ready.addresses[name] for ready in group.ready])
        return request
