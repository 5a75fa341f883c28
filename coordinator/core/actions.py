"""What the coordinator's core wants done, to be executed in order."""

from __future__ import annotations

from dataclasses import dataclass

from ..values import PageCopy, Range, StagePlan
from ..world.record import Record


@dataclass(frozen=True)
class Save:
    """Write down what changed of the record. It comes before every action that follows from the change."""

    before: Record
    after: Record


@dataclass(frozen=True)
class Assign:
    """Tell a worker to hold a layer range."""

    pipeline_id: str
    epoch: int
    num_stages: int
    plan: StagePlan
    address: str
    shares: int
    """Pipelines between which its pages are split."""
    beside: bool = False
    """The pipeline serves at an earlier epoch meanwhile."""


@dataclass(frozen=True)
class Prepare:
    """Tell a worker to load layers that it may have to hold later."""

    worker_id: str
    incarnation: int
    address: str
    layers: Range


@dataclass(frozen=True)
class MakeLink:
    """Offer at the receiver, connect at the sender: from stage `stage` to the next one, from the last to the first."""

    pipeline_id: str
    epoch: int
    stage: int
    transport: str
    sender_address: str
    receiver_address: str
    receiver_id: str
    sender_rank_addresses: tuple[bytes, ...]
    nonces: tuple[int, ...]
    """A fresh one per receiving rank. Where tokens are sent there is one: rank 0 tells the others."""
    receiver_stage: int
    tokens: bool = False
    """Sampled tokens go from the last stage to the first, not activations."""
    copy: PageCopy | None = None
    """KV pages go over it; `stage` is the sender's at the epoch that serves."""


@dataclass(frozen=True)
class Activate:
    """Tell a worker to accept steps at this epoch."""

    pipeline_id: str
    epoch: int
    stage: int
    address: str


@dataclass(frozen=True)
class Release:
    """Tell a worker that its assignment ended. Best effort: the worker may be gone."""

    pipeline_id: str
    epoch: int
    worker_id: str
    address: str
    reason: str
    alone: bool = False
    """What it holds at earlier epochs goes on."""


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


Action = Save | Assign | Prepare | MakeLink | Activate | Release | Forget | Disconnect | Publish | Log
