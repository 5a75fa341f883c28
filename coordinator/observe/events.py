"""What the coordinator's core is told, in the order in which it happened.

Requests of workers, gateways and operators are events as they came over the wire (protos/v1/coordinator.proto says what
each means); the service has checked them.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from ..values import Order


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class WorkerLost:
    """A keep-alive stream broke."""

    worker_id: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class GatewayGone:
    """A gateway no longer watches, or starts over."""

    gateway_id: str


@dataclass(frozen=True)
class Answered:
    """A worker answered an order, or says how far it is with one that takes long."""

    order: Order
    response: Message


@dataclass(frozen=True)
class Failed:
    """An order to a worker failed. `final`: the same worker would fail the same way again."""

    order: Order
    reason: str
    final: bool = False
    transport_failed: bool = False


Event = Tick | WorkerLost | GatewayGone | Answered | Failed | Message
"""A message is a request of coordinator.proto; core/mesh.py has all of them, with what each does to the world."""
