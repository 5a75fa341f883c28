"""What the coordinator's pure core speaks of: workers, stages of a plan, bounds."""

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
    """Stage that it was started for; -1: none."""
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
    any_stage: bool = False
    """Where its pool has a worker, it may hold another stage."""

    def may_hold(self, stage: int) -> bool:
        """Whether it may stand in for `stage`."""
        return self.any_stage or self.pool in (-1, stage)

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
    next: StoredPlan | None = None
    """The epoch that gateways have been told to go over to, where some may not have."""


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
    refused_until: float = 0.0
    """Clock time at which that is forgotten: files and memory may be there by then."""
    progress: Progress = field(default_factory=Progress)

    def refuse(self, stage: int, layers: Range, reason: str, until: float) -> None:
        """It cannot hold a stage's layers, as far as is known."""
        self.refusals[stage, layers] = reason
        self.refused_until = until
