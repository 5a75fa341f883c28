"""Rank 0 of a tensor-parallel group decides what happens next and tells the other ranks over a Unix socket.

A collective would not do: a rank that waits in a collective can neither drive its transport nor take a plan. Steps and
the agent's calls (assign, release, close a session, ...) are sent in one sequence. So no rank closes a session whose
step another rank is about to run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from google.protobuf.message import Message

from stagemesh.errors import InternalError
from stagemesh.processes.frames import parse
from stagemesh.protos.v1 import worker_pb2

from ..messages.control import Kind
from .control_socket import ControlSocket

Order = tuple[Kind, int, worker_pb2.StepOrder]
"""ORDER_STEP, the session, and its next step to run; or ORDER_CALL and the id of a call of the agent."""


class OrderSender:
    """Rank 0's side, with one socket to each other rank."""

    def __init__(self, sockets: Sequence[ControlSocket]) -> None:
        self._sockets = sockets

    def run_step(self, session: int, step: int, tokens: list[int]) -> None:
        """Orders a step. `tokens` replace the plan's references to results. Raises InternalError if a rank is gone."""
        self._send(Kind.ORDER_STEP, session, worker_pb2.StepOrder(step=step, tokens=tokens))

    def take_call(self, call: int) -> None:
        """Orders the other ranks to carry out a call of the agent. Raises InternalError when a rank is gone."""
        self._send(Kind.ORDER_CALL, call)

    def _send(self, kind: Kind, ident: int, message: Message | None = None) -> None:
        for rank, sock in enumerate(self._sockets, start=1):
            sock.send(kind, ident, message)
            if sock.closed:
                raise InternalError(f"rank {rank} of this group is gone")


class OrderReceiver:
    """The side of ranks above 0: a queue of orders, as rank 0 gave them."""

    def __init__(self, sock: ControlSocket, timeout_s: float) -> None:
        self._socket = sock
        self._timeout_s = timeout_s
        self._orders: deque[Order] = deque()
        self._current_since = 0.0

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self._socket.fileno()

    def current(self) -> Order | None:
        """Returns the current order, or None if there is none. Raises InternalError when rank 0 is gone."""
        for kind, ident, payload in self._socket.receive():
            if not self._orders:
                self._current_since = time.monotonic()
            if kind not in (Kind.ORDER_STEP, Kind.ORDER_CALL):
                raise InternalError(f"rank 0 of this group sent {kind.name}, which is no order")
            self._orders.append((kind, ident, parse(worker_pb2.StepOrder, payload)))
        if not self._orders and self._socket.closed:
            raise InternalError("rank 0 of this group is gone")
        return self._orders[0] if self._orders else None

    def check_deadline(self) -> None:
        """Raises InternalError if the current order is too old: rank 0 would wait for ever."""
        waited_s = time.monotonic() - self._current_since
        if waited_s > self._timeout_s:
            kind, ident, order = self._orders[0]
            raise InternalError(
                f"{kind.name} {ident}, step {order.step}, was ordered {waited_s:.0f} s ago and cannot be carried out"
            )

    def done(self) -> None:
        """Removes the current order, which is carried out now. The next one becomes current."""
        self._orders.popleft()
        self._current_since = time.monotonic()
