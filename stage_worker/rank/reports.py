"""Step results on their way to the gateway.

The last stage's bring tokens and go at once. What the others say is how long they took: some of those go together, as
each message costs two processes as much as a token does.
"""

from __future__ import annotations

import time

from stagemesh.protos.v1 import stage_pb2

from ..messages.control import Kind
from .control_socket import ControlSocket

TOGETHER = 16
"""Results of one session in a message, at most."""


class Reports:
    """Results that were not sent yet, by session."""

    def __init__(self, control: ControlSocket, within_s: float) -> None:
        """`within_s`: how long a result may wait for others."""
        self._control = control
        self._within_s = within_s
        self._waiting: dict[int, list[stage_pb2.StepResult]] = {}
        self._since: float | None = None

    def add(self, session: int, result: stage_pb2.StepResult, *, at_once: bool) -> None:
        """A step is done; its result goes now, or with those that follow soon."""
        results = self._waiting.setdefault(session, [])
        results.append(result)
        if at_once or len(results) >= TOGETHER:
            self._send(session, self._waiting.pop(session))
        elif self._since is None:
            self._since = time.monotonic()

    def due_in_s(self, now: float) -> float | None:
        """Seconds until `send_due` has something to send; None when nothing waits."""
        return None if self._since is None else max(0.0, self._since + self._within_s - now)

    def send_due(self, now: float) -> None:
        """Sends what has waited long enough."""
        if self._since is not None and now >= self._since + self._within_s:
            self._since = None
            waiting, self._waiting = self._waiting, {}
            for session, results in waiting.items():
                self._send(session, results)

    def _send(self, session: int, results: list[stage_pb2.StepResult]) -> None:
        message = stage_pb2.RunResponse(results=stage_pb2.StepResults(results=results))
        self._control.send(Kind.RESULT, session, message)
