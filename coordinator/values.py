"""The values that the coordinator's core speaks of. All are frozen.

Messages of protos/v1 serve as values beside them: a worker's registration, limits, page copies, requests. The core
reads them, and never changes one that it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

Range = tuple[int, int]
"""Decoder layers [first, last)."""


def layer_range(layers: Range) -> types_pb2.LayerRange:
    """A range as it travels."""
    return types_pb2.LayerRange(first=layers[0], last=layers[1])


def span(layers: types_pb2.LayerRange) -> Range:
    """A range that came over the wire."""
    return layers.first, layers.last


def pages_per_sequence(limits: types_pb2.RunLimits) -> int:
    """Pages of one sequence of the longest kind."""
    return -(-limits.max_model_len // limits.page_size)


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


StageRequest = (
    stage_pb2.AssignRequest
    | stage_pb2.PrepareRequest
    | stage_pb2.OfferLinkRequest
    | stage_pb2.ConnectLinkRequest
    | stage_pb2.ActivateRequest
    | stage_pb2.ReleaseRequest
)


@dataclass(frozen=True)
class Order:
    """A call of a worker's Stage service."""

    to: RegisterRequest
    """The worker, as it introduced itself."""
    request: StageRequest
    offer: Order | None = None
    """With a ConnectLinkRequest: the call of the link's receiver that comes first. Its answer completes the request."""

    @property
    def attempt(self) -> tuple[str, int] | None:
        """Pipeline and epoch of the attempt that waits for its answer, if one does."""
        request = self.request
        if isinstance(request, stage_pb2.PrepareRequest | stage_pb2.ReleaseRequest):
            return None
        return request.key.pipeline_id, request.key.epoch

    @property
    def what(self) -> str:
        """Its name, for people."""
        return "link" if self.offer is not None else type(self.request).__name__.removesuffix("Request").lower()
