"""The actions that the coordinator's core returns. They are executed in order."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import Order
from ..world.record import Record


@dataclass(frozen=True)
class Save:
    """Store what changed in the record. It comes before every action that follows from the change."""

    before: Record
    after: Record


@dataclass(frozen=True)
class Forget:
    """Cancel calls that still run for `pipeline_id` at an epoch below `epoch`."""

    pipeline_id: str
    epoch: int


@dataclass(frozen=True)
class Disconnect:
    """Close the connection to a worker that is gone."""

    address: str


@dataclass(frozen=True)
class Publish:
    """Send the mesh to the watchers. If it is not urgent, it may be delayed."""

    urgent: bool = True


@dataclass(frozen=True)
class Log:
    """Write a line to the log."""

    message: str
    warning: bool = False


Action = Save | Order | Forget | Disconnect | Publish | Log
