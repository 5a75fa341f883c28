"""What the coordinator's core is told, in the order in which it happened."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protocol import PROTOCOL

from ..values import Loaded, Range, WorkerInfo


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
    late_s: float = 0.0
    """How late the worker's own clock runs."""


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
    force: bool = True
    """Also where nobody takes its stages: its pipelines then take nothing new."""


@dataclass(frozen=True)
class UndrainRequested:
    """An operator takes a drain back."""

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
    """A gateway reports that steps of a pipeline do not come back, or that it does not reach some of its workers."""

    gateway_id: str
    pipeline_id: str
    epoch: int
    reason: str
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True)
class GatewayCame:
    """A gateway watches the mesh."""

    gateway_id: str
    protocol: int = PROTOCOL


@dataclass(frozen=True)
class GatewayGone:
    """A gateway no longer watches, or starts over."""

    gateway_id: str


@dataclass(frozen=True)
class GatewayMoved:
    """A gateway has switched to the next epoch of a pipeline; with an `error`, it could not."""

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
    """An operator wants other layer ranges, one per stage."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class ScaleRequested:
    """An operator wants so many workers on a stage at once; 0: as many as were started for it."""

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
    """A worker has loaded layers that it may have to hold later."""

    worker_id: str
    incarnation: int
    layers: Range
    fingerprint: str


@dataclass(frozen=True)
class PrepareFailed:
    """A worker could not load such layers. `final`: it would fail the same way again."""

    worker_id: str
    incarnation: int
    layers: Range
    reason: str
    final: bool = False


@dataclass(frozen=True)
class LinkUp:
    """The link behind `stage` stands, or the one of a page copy."""

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
    | UndrainRequested
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
