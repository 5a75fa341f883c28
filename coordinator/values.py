"""The values of the coordinator's core. All are frozen.

The core also uses messages of protos/v1 as values: a worker's registration, limits, page copies, requests. It reads
them, and never changes one that it was given.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.planning.partition import Range as Range
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest


def layer_range(layers: Range) -> types_pb2.LayerRange:
    """Converts a range to its message."""
    return types_pb2.LayerRange(first=layers[0], last=layers[1])


def span(layers: types_pb2.LayerRange) -> Range:
    """Converts a message to a range."""
    return layers.first, layers.last


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
    """A worker and the layers that it will hold."""

    worker_id: str
    layers: Range


Holders = tuple[Holder, ...]
"""The worker and layers of each stage of a pipeline, in stage order."""


@dataclass(frozen=True)
class Loaded:
    """A worker's answer when it has loaded its assignment."""

    num_pages: int
    weight_bytes: int = 0
    tensor_bytes_read: int = 0
    fingerprint: str = ""
    kv_layout: str = ""
    """Pages can be copied between workers with equal `kv_layout`."""


@dataclass(frozen=True)
class StoredPlan:
    """A serving pipeline as it is stored for a restart."""

    pipeline_id: str
    epoch: int
    stages: tuple[StagePlan, ...]
    loaded: tuple[Loaded, ...]
    routes: tuple[str, ...]
    terms: str
    """Digest of model and limits. After a restart, a plan with other terms is not resumed."""
    shares: int = 1
    """Number of pipelines that share each worker's pages."""
    next: StoredPlan | None = None
    """The epoch that gateways were told to switch to, while some may not have switched yet."""


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
    """The registration of the worker that is called."""
    request: StageRequest
    offer: Order | None = None
    """With a ConnectLinkRequest: the call to the link's receiver, made first. Its answer completes the request."""

    @property
    def attempt(self) -> tuple[str, int] | None:
        """Pipeline and epoch of the attempt that waits for the answer. None if no attempt does."""
        request = self.request
        if isinstance(request, stage_pb2.PrepareRequest | stage_pb2.ReleaseRequest):
            return None
        return request.key.pipeline_id, request.key.epoch

    @property
    def what(self) -> str:
        """Name of the order in logs and errors."""
        return "link" if self.offer is not None else type(self.request).__name__.removesuffix("Request").lower()
