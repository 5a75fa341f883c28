"""The values that the coordinator's core speaks of: workers, stages, page copies, bounds. All are frozen."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protocol import PROTOCOL

Range = tuple[int, int]
"""Decoder layers [first, last)."""


@dataclass(frozen=True)
class ReportedAssignment:
    """An assignment that a worker says it still holds, when it registers."""

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
    held: tuple[ReportedAssignment, ...] = ()
    version: str = ""
    protocol: int = PROTOCOL
    any_stage: bool = False
    """It may hold another stage where its own has a worker."""

    def may_hold(self, stage: int) -> bool:
        """Whether its pool lets it hold `stage`."""
        return self.any_stage or self.pool in (-1, stage)

    def addresses(self, transport: str) -> tuple[bytes, ...] | None:
        """One address per rank on `transport`, or None where the worker has not opened it."""
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
class Holder:
    """A worker and the layers that it shall hold."""

    worker_id: str
    layers: Range


Holders = tuple[Holder, ...]
"""Who holds what in a pipeline, in stage order."""


@dataclass(frozen=True)
class Loaded:
    """What a worker answered when its assignment was loaded."""

    num_pages: int
    weight_bytes: int = 0
    tensor_bytes_read: int = 0
    fingerprint: str = ""
    kv_layout: str = ""
    """Pages can be copied between workers that say the same."""


@dataclass(frozen=True)
class PageCopy:
    """KV pages of layers that change hands: from a stage of the epoch that serves to a stage of the next one."""

    index: int
    from_epoch: int
    from_stage: int
    to_stage: int
    layers: Range


@dataclass(frozen=True)
class StoredPlan:
    """A pipeline that served when it was written down."""

    pipeline_id: str
    epoch: int
    stages: tuple[StagePlan, ...]
    loaded: tuple[Loaded, ...]
    routes: tuple[str, ...]
    terms: str
    """Digest of model and bounds. A plan for other terms is not taken up again after a restart."""
    shares: int = 1
    """Pipelines between which the pages were split."""
    next: StoredPlan | None = None
    """The epoch that gateways have been told to switch to, while some may not have."""


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
