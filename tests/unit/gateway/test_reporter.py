"""What a gateway has to tell while the coordinator is away: each thing once, and nothing of use is lost."""

from __future__ import annotations

from stagemesh.gateway.session.reporter import FEW, Reporter
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import coordinator_pb2


def test_what_is_said_again_waits_once_and_what_passes_does_not_keep_others_out() -> None:
    reporter = Reporter("127.0.0.1:1", "g", GatewayTiming())
    for _ in range(1000):
        reporter.moved("pipeline-0", 7)
    for pipeline in range(2 * FEW):
        reporter.steps(f"pipeline-{pipeline}", 7, [0.01])
    reporter.stuck("pipeline-0", 7, "no step came back")
    reporter.moved("pipeline-0", 8, error="the pages do not come")
    waiting = reporter.waiting
    kinds = [type(report) for report in waiting]
    assert kinds.count(coordinator_pb2.ReportMovedRequest) == 2
    assert kinds.count(coordinator_pb2.ReportStuckRequest) == 1
    assert len(waiting) == FEW + 2
    assert waiting[0].epoch == 7, "in the order in which they came"
