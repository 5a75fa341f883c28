"""The error tree. Every error that a user, a client or another service can see is one of these.

    StagemeshError
    ├── InvalidRequest          the caller's input is wrong; the message says which field and what would be right
    │   └── PromptTooLong       prompt + output do not fit --max-model-len
    ├── NotFound                no such model, worker or request
    ├── Unauthenticated         missing or wrong API key
    ├── QueueFull               admission queue at its bound; `retry_after_s` says when to come back
    ├── Unavailable             no pipeline can serve now; `retry_after_s`
    │   └── StageLost           a stage went away while this request was running
    │       └── RanksDied       its ranks died with steps under way
    ├── DeadlineExceeded        the request's own deadline passed
    ├── Cancelled               the client went away or called Cancel
    ├── ConfigError             settings or the mesh they ask for cannot be built (numbers and the fix in the text)
    ├── CheckpointError         a checkpoint is damaged, incomplete or of another revision
    │   └── UnsupportedModel    an architecture that cannot be split; the reason and what can be
    ├── StaleEpoch              an order from an epoch that has passed; refused and counted
    ├── TransportError          a link or its peer failed
    ├── NumericalError          NaN or infinity in one request's logits
    ├── PoisonedRequest         the ranks of a stage died each time this request was computed
    └── InternalError           a bug of ours; the request fails, the mesh goes on

Each class states its reason and its gRPC and HTTP statuses. Errors of other libraries are converted where they enter,
and keep their cause.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from grpc import StatusCode as Code

_BY_REASON: dict[str, type[StagemeshError]] = {}


class StagemeshError(Exception):
    """Root of the tree. `reason` is a stable upper-case identifier (google.rpc.ErrorInfo.reason).

    Clients get the statuses. A class without its own statuses takes those of its base.
    """

    reason = "INTERNAL"
    grpc_status = Code.INTERNAL
    http_status = 500

    def __init_subclass__(cls, reason: str | None = None, **statuses: Code | int) -> None:
        for name, status in statuses.items():
            setattr(cls, name, status)
        if reason is not None:
            cls.reason, _BY_REASON[reason] = reason, cls

    def __init__(self, message: str, *, retry_after_s: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param


class InvalidRequest(StagemeshError, reason="INVALID_REQUEST", grpc_status=Code.INVALID_ARGUMENT, http_status=400):
    """The caller's input is wrong."""


class PromptTooLong(InvalidRequest, reason="CONTEXT_LENGTH_EXCEEDED"):
    """Prompt and requested output exceed the longest sequence the mesh was started for."""


class NotFound(StagemeshError, reason="NOT_FOUND", grpc_status=Code.NOT_FOUND, http_status=404):
    """No such model, worker or request."""


class Unauthenticated(StagemeshError, reason="UNAUTHENTICATED", grpc_status=Code.UNAUTHENTICATED, http_status=401):
    """Missing or wrong API key."""


class QueueFull(StagemeshError, reason="QUEUE_FULL", grpc_status=Code.RESOURCE_EXHAUSTED, http_status=429):
    """The admission queue is at its bound."""


class Unavailable(StagemeshError, reason="UNAVAILABLE", grpc_status=Code.UNAVAILABLE, http_status=503):
    """No pipeline can serve now."""


class StageLost(Unavailable, reason="STAGE_LOST"):
    """A stage went away while the request was running."""


class RanksDied(StageLost):
    """The ranks of a stage died with steps under way, one of which may be the cause."""


class DeadlineExceeded(StagemeshError, reason="DEADLINE_EXCEEDED", grpc_status=Code.DEADLINE_EXCEEDED, http_status=504):
    """The request's own deadline passed."""


class Cancelled(StagemeshError, reason="CANCELLED", grpc_status=Code.CANCELLED, http_status=499):
    """The client went away or asked to stop."""


class ConfigError(StagemeshError, reason="CONFIG", grpc_status=Code.FAILED_PRECONDITION, http_status=503):
    """Settings, or the mesh they ask for, cannot be built."""


class CheckpointError(StagemeshError, reason="CHECKPOINT", grpc_status=Code.FAILED_PRECONDITION, http_status=503):
    """A checkpoint is damaged, incomplete or of another revision."""


class UnsupportedModel(CheckpointError, reason="UNSUPPORTED_MODEL"):
    """An architecture that cannot be split into stages."""


class StaleEpoch(StagemeshError, reason="STALE_EPOCH", grpc_status=Code.ABORTED, http_status=503):
    """An order from an epoch that has passed."""


class TransportError(StagemeshError, reason="TRANSPORT", grpc_status=Code.UNAVAILABLE, http_status=503):
    """A link or its peer failed."""


class NumericalError(StagemeshError, reason="NUMERICAL"):
    """NaN or infinity in one request's logits."""


class PoisonedRequest(StagemeshError, reason="POISONED_REQUEST"):
    """The ranks of a stage died each time this request was computed, the last time while nothing else was."""


class InternalError(StagemeshError, reason="INTERNAL"):
    """A bug of ours."""


def by_reason(reason: str) -> type[StagemeshError]:
    """Returns the class of a peer's `ErrorInfo.reason`, or `InternalError` if the reason is unknown."""
    return _BY_REASON.get(reason, InternalError)


def by_status(status: Code) -> type[StagemeshError]:
    """Returns the class for the status of a peer that gives no reason. This is `InternalError` for most statuses."""
    own = (cls for cls in _BY_REASON.values() if vars(cls).get("grpc_status") is status)
    return next(own, InternalError)


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """A context that raises the first of our errors in a task group's exception group, in place of the group."""
    try:
        yield
    except* StagemeshError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
