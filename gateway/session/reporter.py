"""What this gateway tells the coordinator. While that is away nothing is lost: what still holds is said again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from stagemesh import rpc
from stagemesh.errors import StagemeshError, Unavailable
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc

from ..timing import GatewayTiming

log = logging.getLogger(__name__)

FEW, WAITING = 8, 256
"""Reports that wait at most; behind a few, what steps take is not told."""
STEPS = "ReportSteps"

Report = (
    coordinator_pb2.ReportStuckRequest
    | coordinator_pb2.ReportMovedRequest
    | coordinator_pb2.ReportLeftRequest
    | coordinator_pb2.ReportStepsRequest
)


class Reporter:
    """Sends reports, one after the other. `run` must run."""

    def __init__(self, coordinator: str, gateway_id: str, timing: GatewayTiming) -> None:
        self._timing = timing
        self._coordinator, self._gateway_id = coordinator, gateway_id
        self._waiting: dict[tuple[str, str, int], Report] = {}
        """(method, pipeline, epoch) -> what is to be told, the oldest first. What is said again takes the place of what
        waits."""
        self._there = asyncio.Event()

    def stuck(self, pipeline_id: str, epoch: int, reason: str, unreachable: Sequence[str] = ()) -> None:
        """Steps do not come back, or workers cannot be reached from here, which nobody but this side sees."""
        report = coordinator_pb2.ReportStuckRequest(epoch=epoch, reason=reason, unreachable=unreachable)
        self._put("ReportStuck", pipeline_id, epoch, report)

    def moved(self, pipeline_id: str, epoch: int, error: str = "") -> None:
        """This gateway has switched to an epoch, or cannot."""
        report = coordinator_pb2.ReportMovedRequest(epoch=epoch, error=error)
        self._put("ReportMoved", pipeline_id, epoch, report)

    def left(self, pipeline_id: str) -> None:
        """This gateway has nothing more to do with a pipeline."""
        self._put("ReportLeft", pipeline_id, 0, coordinator_pb2.ReportLeftRequest())

    def steps(self, pipeline_id: str, epoch: int, seconds: Sequence[float]) -> None:
        """What a step takes on each stage."""
        report = coordinator_pb2.ReportStepsRequest(epoch=epoch, step_us=[round(s * 1e6) for s in seconds])
        self._put(STEPS, pipeline_id, epoch, report)

    @property
    def waiting(self) -> list[Report]:
        """What is still to be told, the oldest first."""
        return list(self._waiting.values())

    def _put(self, method: str, pipeline_id: str, epoch: int, report: Report) -> None:
        report.gateway_id, report.pipeline_id = self._gateway_id, pipeline_id
        if len(self._waiting) >= (FEW if method == STEPS else WAITING):
            log.log(_level(method), "too much is to be told of %s", pipeline_id)
            return
        self._waiting[method, pipeline_id, epoch] = report
        self._there.set()

    async def run(self) -> None:
        """Until cancelled."""
        channel = rpc.channel(self._coordinator)
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        try:
            while True:
                await self._there.wait()
                key = next(iter(self._waiting))
                await self._tell(stub, key[0], self._waiting.pop(key))
                if not self._waiting:
                    self._there.clear()
        finally:
            await channel.close(None)

    async def _tell(self, stub: coordinator_pb2_grpc.CoordinatorStub, method: str, report: Report) -> None:
        """Again while the coordinator is away, but for what steps take: the next report of that says more."""
        deadline = time.monotonic() + self._timing.away_s
        while True:
            try:
                with rpc.mapped():
                    await getattr(stub, method)(report, timeout=self._timing.report_s)
                return
            except StagemeshError as e:
                if method != STEPS and isinstance(e, Unavailable) and time.monotonic() < deadline:
                    await asyncio.sleep(self._timing.retry_s)
                    continue
                log.log(_level(method), "the coordinator was not told of %s: %s", report.pipeline_id, e.message)
                return


def _level(method: str) -> int:
    """One of the release before does not know what steps are for."""
    return logging.DEBUG if method == STEPS else logging.WARNING
