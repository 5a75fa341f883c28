"""What the coordinator's core wants done, to be executed in order."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import Order
from ..world.record import Record


@dataclass(frozen=True)
class Save:
    """Write down what changed of the record. It comes before every action that follows from the change."""

    before: Record
    after: Record


@dataclass(frozen=True)
class Forget:
    """Cancel what still runs for `pipeline_id` at an epoch below `epoch`: nothing of it is of use."""

    pipeline_id: str
    epoch: int


@dataclass(frozen=True)
class Disconnect:
    """A worker is gone: its connection is of no use."""

    address: str


@dataclass(frozen=True)
class Publish:
    """Tell the watchers. What is not urgent may be told with a delay."""

    urgent: bool = True


@dataclass(frozen=True)
class Log:
    """Say it in the log."""

    message: str
    warning: bool = False


Action = Save | Order | Forget | Disconnect | Publish | Log
