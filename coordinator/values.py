"""What the coordinator's pure core speaks of: workers, stages of a plan, events in, actions out."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagemesh.protocol import PROTOCOL

Range = tuple[int, int]
"""Decoder layers [first, last)."""


@dataclass(frozen=True)
class Held:
    """An assignment that a worker says it still holds."""

    pipeline_id: str
    epoch: int
    stage: int
    layers: Range
    generation: int
    active: bool
    fingerprint: str


@dataclass(frozen=True)
class WorkerInfo:
    """A worker as it introduced itself. Rates and memory are of one rank; 0 means not measured."""

    worker_id: str
    incarnation: int
    address: str
    pool: int = -1
    tp_size: int = 1
    device_kind: str = "cpu"
    device_name: str = ""
    memory_bytes: int = 0
    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0
    transports: tuple[tuple[str, tuple[bytes, ...]], ...] = ()
    """(name, one address per rank)."""
    held: tuple[Held, ...] = ()
    version: str = ""
    protocol: int = PROTOCOL

    def addresses(self, transport: str) -> tuple[bytes, ...] | None:
        """Addresses of its ranks on `transport`, or None where it has not opened it."""
        return dict(self.transports).get(transport)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a pipeline: which worker holds which layers."""

    stage: int
    worker_id: str
    incarnation: int
    layers: Range
    generation: int


@dataclass(frozen=True)
class Loaded:
    """What a worker said when its assignment was loaded."""

    num_pages: int
    weight_bytes: int = 0
    tensor_bytes_read: int = 0
    fingerprint: str = ""
    kv_layout: str = ""
    """Pages can be copied between workers that say the same."""


@dataclass(frozen=True)
class Copy:
    """KV pages of layers that change hands: from a stage of the epoch that serves to one of the next."""

    index: int
    from_epoch: int
    from_stage: int
    to_stage: int
    layers: Range


@dataclass(frozen=True)
class StoredPlan:
    """A pipeline that was serving when it was written down."""

    pipeline_id: str
    epoch: int
    stages: tuple[StagePlan, ...]
    loaded: tuple[Loaded, ...]
    routes: tuple[str, ...]
    terms: str
    """Digest of model and bounds; a plan made for other terms is not taken up again."""
    shares: int = 1
    """Pipelines between which pages were split."""


# Events


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class WorkerRegistered:
    """A worker introduced itself, for the first time or again."""

    info: WorkerInfo


@dataclass(frozen=True)
class LeaseRenewed:
    """A keep-alive came."""

    worker_id: str
    incarnation: int


@dataclass(frozen=True)
class WorkerLost:
    """A keep-alive stream broke."""

    worker_id: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class DrainRequested:
    """An operator, or the worker itself, takes it out of service."""

    worker_id: str


@dataclass(frozen=True)
class LinkBroken:
    """A worker reports that a link of an active pipeline broke."""

    worker_id: str
    pipeline_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class StepsStuck:
    """A gateway reports that steps of a pipeline do not come back."""

    gateway_id: str
    pipeline_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class GatewayCame:
    """A gateway follows the mesh."""

    gateway_id: str
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class GatewayGone:
    """It does no longer, or starts over."""

    gateway_id: str


@dataclass(frozen=True)
class GatewayMoved:
    """A gateway drives the next epoch of a pipeline; with an `error`, it cannot."""

    gateway_id: str
    pipeline_id: str
    epoch: int
    error: str = ""


@dataclass(frozen=True)
class StepsMeasured:
    """A gateway reports what a step takes on each stage, in seconds."""

    gateway_id: str
    pipeline_id: str
    epoch: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class RepartitionRequested:
    """An operator wants other layer ranges, one a stage."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class ScaleRequested:
    """An operator wants so many workers on a stage at once; 0: as many as are bound to it."""

    stage: int
    replicas: int


@dataclass(frozen=True)
class GatewayLeft:
    """A gateway has nothing more to do with a pipeline that is to be no more."""

    gateway_id: str
    pipeline_id: str


@dataclass(frozen=True)
class AssignProgress:
    """Bytes loaded so far."""

    pipeline_id: str
    epoch: int
    stage: int
    loaded_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class AssignDone:
    """A worker holds its layers."""

    pipeline_id: str
    epoch: int
    stage: int
    loaded: Loaded


@dataclass(frozen=True)
class Prepared:
    """A standby has loaded layers."""

    worker_id: str
    incarnation: int
    layers: Range
    fingerprint: str


@dataclass(frozen=True)
class PrepareFailed:
    """A standby could not load layers. `final`: it would fail the same way again."""

    worker_id: str
    incarnation: int
    layers: Range
    reason: str
    final: bool = False


@dataclass(frozen=True)
class LinkUp:
    """The link from `stage` to the next stands, or the one of a copy to `stage`."""

    pipeline_id: str
    epoch: int
    stage: int
    route: str
    copy: int | None = None


@dataclass(frozen=True)
class Activated:
    """A worker acknowledged `Activate`."""

    pipeline_id: str
    epoch: int
    stage: int


@dataclass(frozen=True)
class StepFailed:
    """An order to a worker failed. `final`: the same worker would fail the same way again."""

    pipeline_id: str
    epoch: int
    stage: int
    what: str
    """"assign", "link" or "activate"."""
    reason: str
    final: bool = False
    transport_failed: bool = False


Event = (
    Tick
    | WorkerRegistered
    | LeaseRenewed
    | WorkerLost
    | DrainRequested
    | LinkBroken
    | StepsStuck
    | GatewayCame
    | GatewayGone
    | GatewayMoved
    | StepsMeasured
    | RepartitionRequested
    | ScaleRequested
    | GatewayLeft
    | AssignProgress
    | AssignDone
    | Prepared
    | PrepareFailed
    | LinkUp
    | Activated
    | StepFailed
)


# Actions, to be executed in order


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


@dataclass(frozen=True)
class Limits:
    """Bounds that every worker of a pipeline allocates for."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    steps_in_flight: int
    gateways: int = 1

    @property
    def pages_per_sequence(self) -> int:
        """Pages of one sequence of the longest kind."""
        return -(-self.max_model_len // self.page_size)


@dataclass
class Progress:
    """Of one loading assignment, in bytes."""

    loaded_bytes: int = 0
    total_bytes: int = 0


@dataclass
class Worker:
    """A worker as the coordinator knows it."""

    info: WorkerInfo
    deadline: float
    """Clock time at which its lease ends."""
    kept: Range | None = None
    """Layers whose weights it has loaded."""
    beside: Range | None = None
    """Further layers that it has loaded, beside those that it holds."""
    preparing: Range | None = None
    """Layers that it loads, to hold them later."""
    prepare_after: float = 0.0
    """Clock time before which it is not asked to, as it just failed."""
    draining: bool = False
    refusals: dict[tuple[int, Range], str] = field(default_factory=dict)
    """(stage, layers) that this incarnation cannot hold, and why."""
    progress: Progress = field(default_factory=Progress)
