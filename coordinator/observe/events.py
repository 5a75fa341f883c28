"""The events that the coordinator's core handles, in the order in which they happened.

Requests of workers, gateways and operators are events too, as the messages of protos/v1/coordinator.proto, which says
what each means. The service has checked them.
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
    """A watch stream of a gateway ended."""

    gateway_id: str


@dataclass(frozen=True)
class Answered:
    """A worker answered an order, or reported its progress."""

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
"""A message is a request of coordinator.proto. core/mesh.py lists them all, with their observers."""
