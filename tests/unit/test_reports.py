"""Step results leave a rank one by one where tokens are in them, and a few together where not."""

from __future__ import annotations

import socket
import time

from stagemesh.protos.v1 import stage_pb2
from stagemesh.stage_worker.messages.control import Kind
from stagemesh.stage_worker.rank.control_socket import ControlSocket
from stagemesh.stage_worker.rank.reports import TOGETHER, Reports

WITHIN_S = 5.0


def steps_of(reader: ControlSocket) -> list[tuple[int, list[int]]]:
    """(session, steps) of each message that has come."""
    out = []
    for kind, ident, payload in reader.receive():
        assert kind == Kind.RESULT
        out.append((ident, [r.step for r in stage_pb2.RunResponse.FromString(payload).results.results]))
    return out


def test_results_go_at_once_or_together_and_always_within_their_time() -> None:
    ours, theirs = socket.socketpair()
    reports, reader = Reports(ControlSocket(ours, 1.0), WITHIN_S), ControlSocket(theirs, 1.0)
    reports.add(1, stage_pb2.StepResult(step=1), at_once=True)
    assert steps_of(reader) == [(1, [1])]
    assert reports.due_in_s(0.0) is None
    for step in range(2, 2 + TOGETHER - 1):
        reports.add(1, stage_pb2.StepResult(step=step), at_once=False)
    assert steps_of(reader) == []
    reports.add(1, stage_pb2.StepResult(step=99), at_once=False)
    assert steps_of(reader) == [(1, [*range(2, 1 + TOGETHER), 99])]
    reports.add(2, stage_pb2.StepResult(step=5), at_once=False)
    now = time.monotonic()
    due_at = now + (reports.due_in_s(now) or 0.0) + 1e-6
    assert now < due_at < now + WITHIN_S + 1e-3
    reports.send_due(due_at - WITHIN_S / 2)
    assert steps_of(reader) == []
    reports.send_due(due_at)
    assert steps_of(reader) == [(2, [5])]
    assert reports.due_in_s(due_at) is None
