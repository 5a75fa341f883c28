"""Sends step results to the gateway.

Results of the last stage contain tokens and are sent at once. Results of other stages contain only timings. Several of
them are sent in one message, because each message costs CPU time in two processes.
"""

from __future__ import annotations

import time

from stagemesh.protos.v1 import stage_pb2

from ..messages.control import Kind
from .control_socket import ControlSocket

TOGETHER = 16
"""Largest number of results in one message."""


class Reports:
    """The results that have not been sent yet, by session."""

    def __init__(self, control: ControlSocket, within_s: float) -> None:
        """`within_s`: longest time in seconds that a result waits for others."""
        self._control = control
        self._within_s = within_s
        self._waiting: dict[int, list[stage_pb2.StepResult]] = {}
        self._since: float | None = None

    def add(self, session: int, result: stage_pb2.StepResult, *, at_once: bool) -> None:
        """Adds the result of a step. It is sent now, or together with later ones."""
        results = self._waiting.setdefault(session, [])
        results.append(result)
        if at_once or len(results) >= TOGETHER:
            self._send(session, self._waiting.pop(session))
        elif self._since is None:
            self._since = time.monotonic()

    def due_in_s(self, now: float) -> float | None:
        """Returns the seconds until `send_due` will send something, or None if nothing waits."""
        return None if self._since is None else max(0.0, self._since + self._within_s - now)

    def send_due(self, now: float) -> None:
        """Sends results that have waited long enough."""
        if self._since is not None and now >= self._since + self._within_s:
            self._since = None
            waiting, self._waiting = self._waiting, {}
            for session, results in waiting.items():
                self._send(session, results)

    def _send(self, session: int, results: list[stage_pb2.StepResult]) -> None:
        message = stage_pb2.RunResponse(results=stage_pb2.StepResults(results=results))
        self._control.send(Kind.RESULT, session, message)
