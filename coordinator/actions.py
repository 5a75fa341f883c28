"""What the coordinator's pure core wants done, to be executed in order."""

from __future__ import annotations

from dataclasses import dataclass

from .values import Copy, Range, StagePlan, StoredPlan


@dataclass(frozen=True)
class PersistEpoch:
    """Write down the epoch before anyone hears of it."""

    pipeline_id: str
    epoch: int


@dataclass(frozen=True)
class PersistPlan:
    """Write down a pipeline that serves, before it is published."""

    plan: StoredPlan


@dataclass(frozen=True)
class PersistReplicas:
    """Write down what an operator wants of each stage."""

    replicas: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PersistPartition:
    """Write down the layers of each stage that are wanted; None: what settings or the cost model say."""

    terms: str
    counts: tuple[int, ...] | None


@dataclass(frozen=True)
class PersistDrains:
    """Write down which lives of workers drain."""

    drains: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ForgetPlan:
    """A pipeline is no more: what was written down of it, but for its epoch, is not to be taken up again."""

    pipeline_id: str


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
    """The pipeline goes on at an earlier epoch meanwhile."""


@dataclass(frozen=True)
class Prepare:
    """Tell a standby to load layers."""

    worker_id: str
    incarnation: int
    address: str
    layers: Range


@dataclass(frozen=True)
class MakeLink:
    """Offer on the receiver, connect on the sender: from stage `stage` to the next, from the last to the first."""

    pipeline_id: str
    epoch: int
    stage: int
    transport: str
    sender_address: str
    receiver_address: str
    receiver_id: str
    sender_rank_addresses: tuple[bytes, ...]
    nonces: tuple[int, ...]
    """A fresh one per receiving rank; where tokens are sent, one: rank 0 tells the others."""
    receiver_stage: int
    tokens: bool
    """From the last stage to the first go sampled tokens, not activations."""
    copy: Copy | None = None
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
    """Tell a worker that its assignment ended. Best effort: it may be gone."""

    pipeline_id: str
    epoch: int
    worker_id: str
    address: str
    reason: str
    alone: bool = False
    """What it holds at earlier epochs goes on."""


@dataclass(frozen=True)
class Forget:
    """Nothing that still runs for `pipeline_id` at an epoch below `epoch` is of use: cancel it."""

    pipeline_id: str
    epoch: int


@dataclass(frozen=True)
class Disconnect:
    """A worker is gone: its connection is of no use."""

    address: str


@dataclass(frozen=True)
class Publish:
    """Tell the watchers. Progress alone may be told with a delay."""

    urgent: bool = True


@dataclass(frozen=True)
class Log:
    """Say it in the log."""

    message: str
    warning: bool = False


Action = (
    PersistEpoch
    | PersistPlan
    | PersistReplicas
    | PersistPartition
    | PersistDrains
    | ForgetPlan
    | Assign
    | Prepare
    | MakeLink
    | Activate
    | Release
    | Forget
    | Disconnect
    | Publish
    | Log
)
