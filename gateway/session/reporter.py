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

Report = (
    coordinator_pb2.ReportStuckRequest
    | coordinator_pb2.ReportMovedRequest
    | coordinator_pb2.ReportLeftRequest
    | coordinator_pb2.ReportStepsRequest
)
METHODS = {
    coordinator_pb2.ReportStuckRequest: "ReportStuck",
    coordinator_pb2.ReportMovedRequest: "ReportMoved",
    coordinator_pb2.ReportLeftRequest: "ReportLeft",
    coordinator_pb2.ReportStepsRequest: "ReportSteps",
}


class Reporter:
    """Sends reports, one after the other. `run` must run."""

    def __init__(self, coordinator: str, gateway_id: str, timing: GatewayTiming) -> None:
        self._timing = timing
        self._coordinator, self._gateway_id = coordinator, gateway_id
        self._waiting: dict[tuple[type[Report], str, int], Report] = {}
        """What is to be told, the oldest first; what is said again takes the place of what waits."""
        self._there = asyncio.Event()

    def stuck(self, pipeline_id: str, epoch: int, reason: str, unreachable: Sequence[str] = ()) -> None:
        """Steps do not come back, or workers cannot be reached from here, which nobody but this side sees."""
        self._put(
            coordinator_pb2.ReportStuckRequest(
                gateway_id=self._gateway_id,
                pipeline_id=pipeline_id,
                epoch=epoch,
                reason=reason,
                unreachable=unreachable,
            )
        )

    def moved(self, pipeline_id: str, epoch: int, error: str = "") -> None:
        """This gateway has switched to an epoch, or cannot."""
        self._put(
            coordinator_pb2.ReportMovedRequest(
                gateway_id=self._gateway_id, pipeline_id=pipeline_id, epoch=epoch, error=error
            )
        )

    def left(self, pipeline_id: str) -> None:
        """This gateway has nothing more to do with a pipeline."""
        self._put(coordinator_pb2.ReportLeftRequest(gateway_id=self._gateway_id, pipeline_id=pipeline_id))

    def steps(self, pipeline_id: str, epoch: int, seconds: Sequence[float]) -> None:
        """What a step takes on each stage."""
        self._put(
            coordinator_pb2.ReportStepsRequest(
                gateway_id=self._gateway_id,
                pipeline_id=pipeline_id,
                epoch=epoch,
                step_us=[round(s * 1e6) for s in seconds],
            )
        )

    @property
    def waiting(self) -> list[Report]:
        """What is still to be told, the oldest first."""
        return list(self._waiting.values())

    def _put(self, report: Report) -> None:
        passing = isinstance(report, coordinator_pb2.ReportStepsRequest)
        if len(self._waiting) >= (FEW if passing else WAITING):
            log.log(logging.DEBUG if passing else logging.WARNING, "too much is to be told of %s", report.pipeline_id)
            return
        epoch = 0 if isinstance(report, coordinator_pb2.ReportLeftRequest) else report.epoch
        self._waiting[type(report), report.pipeline_id, epoch] = report
        self._there.set()

    async def run(self) -> None:
        """Until cancelled."""
        channel = rpc.channel(self._coordinator)
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        try:
            while True:
                await self._there.wait()
                await self._tell(stub, self._waiting.pop(next(iter(self._waiting))))
                if not self._waiting:
                    self._there.clear()
        finally:
            await channel.close(None)

    async def _tell(self, stub: coordinator_pb2_grpc.CoordinatorStub, report: Report) -> None:
        """Again while the coordinator is away, but for what steps take: the next report of that says more."""
        passing = isinstance(report, coordinator_pb2.ReportStepsRequest)
        deadline = time.monotonic() + self._timing.away_s
        while True:
            try:
                with rpc.mapped():
                    await getattr(stub, METHODS[type(report)])(report, timeout=self._timing.report_s)
                return
            except StagemeshError as e:
                if not passing and isinstance(e, Unavailable) and time.monotonic() < deadline:
                    await asyncio.sleep(self._timing.retry_s)
                    continue
                # One of the release before does not know what steps are for.
                level = logging.DEBUG if passing else logging.WARNING
                log.log(level, "the coordinator was not told of %s: %s", report.pipeline_id, e.message)
                return
