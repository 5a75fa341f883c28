"""Step results leave a rank one by one where tokens are in them, and a few together where not."""

from __future__ import annotations

import socket

from stagemesh.protos.v1 import stage_pb2
from stagemesh.stage_worker.messages.control import Kind, Socket
from stagemesh.stage_worker.rank.reports import TOGETHER, WITHIN_S, Reports


def steps_of(reader: Socket) -> list[tuple[int, list[int]]]:
    """(session, steps) of each message that has come."""
    out = []
    for kind, ident, payload in reader.receive():
        assert kind == Kind.RESULT
        out.append((ident, [r.step for r in stage_pb2.RunResponse.FromString(payload).results.results]))
    return out


def test_results_go_at_once_or_together_and_always_within_their_time() -> None:
    ours, theirs = socket.socketpair()
    reports, reader = Reports(Socket(ours)), Socket(theirs)
    reports.add(1, stage_pb2.StepResult(step=1), at_once=True)
    assert steps_of(reader) == [(1, [1])]
    assert reports.due_in_s(0.0) is None
    for step in range(2, 2 + TOGETHER - 1):
        reports.add(1, stage_pb2.StepResult(step=step), at_once=False)
    assert steps_of(reader) == []
    reports.add(1, stage_pb2.StepResult(step=99), at_once=False)
    assert steps_of(reader) == [(1, [*range(2, 1 + TOGETHER), 99])]
    reports.add(2, stage_pb2.StepResult(step=5), at_once=False)
    began = reports._since
    assert began is not None
    reports.send_due(began + WITHIN_S / 2)
    assert steps_of(reader) == []
    reports.send_due(began + WITHIN_S)
    assert steps_of(reader) == [(2, [5])]
    assert reports.due_in_s(began + WITHIN_S) is None
