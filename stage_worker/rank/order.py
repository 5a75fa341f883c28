"""Rank 0 of a tensor-parallel group decides what happens next and tells the other ranks over a Unix socket.

Not by a collective: a rank that waits inside a collective can neither drive its transport nor take a plan. Steps and
the agent's calls (assign, release, close a session, ...) travel in one order, so no rank closes a session whose step
another rank is about to run.
"""

from __future__ import annotations

import socket
import struct
import time
from array import array
from collections import deque
from dataclasses import dataclass

from stagemesh.errors import InternalError

from ..messages.control import Kind, Socket

STEP = struct.Struct("<Q")
ORDER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RunStep:
    """Run this step of this session next."""

    session: int
    step: int
    tokens: tuple[int, ...] = ()
    """Input tokens that are results of earlier steps: rank 0 alone is told them."""


@dataclass(frozen=True)
class TakeCall:
    """Carry out the agent's call of this id next."""

    call: int


class OrderSender:
    """Rank 0's side: one socket to each other rank."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = [Socket(sock) for sock in sockets]

    def run_step(self, session: int, step: int, tokens: list[int]) -> None:
        """Orders a step; `tokens` stand where its plan refers to results. Raises InternalError when a rank is gone."""
        self._send(Kind.ORDER_STEP, session, STEP.pack(step) + array("i", tokens).tobytes())

    def take_call(self, call: int) -> None:
        """Orders a call of the agent. Raises InternalError when a rank is gone."""
        self._send(Kind.ORDER_CALL, call, b"")

    def _send(self, kind: Kind, ident: int, payload: bytes) -> None:
        for rank, sock in enumerate(self._sockets, start=1):
            sock.send(kind, ident, payload)
            if sock.closed:
                raise InternalError(f"rank {rank} of this group is gone")


class OrderReceiver:
    """Another rank's side: orders in the order in which rank 0 gave them."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = Socket(sock)
        self._orders: deque[RunStep | TakeCall] = deque()
        self._current_since = 0.0

    def fileno(self) -> int:
        """For poll."""
        return self._socket.fileno()

    def current(self) -> RunStep | TakeCall | None:
        """What to do now; None when there is no order. Raises InternalError when rank 0 is gone."""
        for kind, ident, payload in self._socket.receive():
            if not self._orders:
                self._current_since = time.monotonic()
            self._orders.append(_run_step(ident, payload) if kind == Kind.ORDER_STEP else TakeCall(ident))
        if not self._orders and self._socket.closed:
            raise InternalError("rank 0 of this group is gone")
        return self._orders[0] if self._orders else None

    def check_deadline(self) -> None:
        """Raises InternalError when the current order cannot be carried out in time: rank 0 would wait for ever."""
        waited_s = time.monotonic() - self._current_since
        if waited_s > ORDER_TIMEOUT_S:
            raise InternalError(f"{self._orders[0]} was ordered {waited_s:.0f} s ago and cannot be carried out")

    def done(self) -> None:
        """The current order is being carried out."""
        self._orders.popleft()
        self._current_since = time.monotonic()


def _run_step(session: int, payload: bytes) -> RunStep:
    tokens = array("i")
    tokens.frombytes(payload[STEP.size :])
    return RunStep(session, STEP.unpack_from(payload)[0], tuple(tokens))
