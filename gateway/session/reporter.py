"""Reports to the coordinator. While it is away, reports wait and are sent again."""

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
"""Most reports that may wait: `FEW` before a report of step times is dropped, `WAITING` before any other is."""
STEPS = "ReportSteps"

Report = (
    coordinator_pb2.ReportStuckRequest
    | coordinator_pb2.ReportMovedRequest
    | coordinator_pb2.ReportLeftRequest
    | coordinator_pb2.ReportStepsRequest
)


class Reporter:
    """Sends reports, one after the other. `run` must run as a task."""

    def __init__(self, coordinator: str, gateway_id: str, timing: GatewayTiming) -> None:
        self._timing = timing
        self._coordinator, self._gateway_id = coordinator, gateway_id
        self._waiting: dict[tuple[str, str, int], Report] = {}
        """(method, pipeline, epoch) -> the report that waits, the oldest first. A newer report replaces it."""
        self._there = asyncio.Event()

    def stuck(self, pipeline_id: str, epoch: int, reason: str, unreachable: Sequence[str] = ()) -> None:
        """Reports that steps do not come back, or that this gateway does not reach workers. Only it can notice that."""
        report = coordinator_pb2.ReportStuckRequest(epoch=epoch, reason=reason, unreachable=unreachable)
        self._put("ReportStuck", pipeline_id, epoch, report)

    def moved(self, pipeline_id: str, epoch: int, error: str = "") -> None:
        """Reports that this gateway has switched to an epoch, or cannot."""
        report = coordinator_pb2.ReportMovedRequest(epoch=epoch, error=error)
        self._put("ReportMoved", pipeline_id, epoch, report)

    def left(self, pipeline_id: str) -> None:
        """Reports that this gateway has left a pipeline."""
        self._put("ReportLeft", pipeline_id, 0, coordinator_pb2.ReportLeftRequest())

    def steps(self, pipeline_id: str, epoch: int, seconds: Sequence[float]) -> None:
        """Reports the seconds of a step on each stage."""
        report = coordinator_pb2.ReportStepsRequest(epoch=epoch, step_us=[round(s * 1e6) for s in seconds])
        self._put(STEPS, pipeline_id, epoch, report)

    @property
    def waiting(self) -> list[Report]:
        """Reports that are not sent yet, the oldest first."""
        return list(self._waiting.values())

    def _put(self, method: str, pipeline_id: str, epoch: int, report: Report) -> None:
        report.gateway_id, report.pipeline_id = self._gateway_id, pipeline_id
        if len(self._waiting) >= (FEW if method == STEPS else WAITING):
            log.log(_level(method), "too many reports wait: one of %s is dropped", pipeline_id)
            return
        self._waiting[method, pipeline_id, epoch] = report
        self._there.set()

    async def run(self) -> None:
        """Sends reports until cancelled."""
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
        """Sends a report. Repeats it while the coordinator is away, except step times: the next report is newer."""
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
                log.log(_level(method), "a report of %s was not delivered: %s", report.pipeline_id, e.message)
                return


def _level(method: str) -> int:
    """Level of log lines on a report that failed. Coordinators of an older release refuse reports of steps."""
    return logging.DEBUG if method == STEPS else logging.WARNING
