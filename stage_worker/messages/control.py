"""Kinds of frames between an agent and its ranks, and between rank 0 and the other ranks, and their payloads.

Payloads are protobuf messages. RUN and RESULT carry a gateway's messages (`RunRequest`, `RunResponse`), which the agent
forwards unparsed.
"""

from __future__ import annotations

import enum

from stagemesh.errors import InternalError, StagemeshError, by_reason
from stagemesh.protos.v1 import worker_pb2


class Kind(enum.IntEnum):
    """Kind of a frame. The id of the frame is a call's (ASSIGN to PREPARE, and their answers) or a session's (RUN,
    RESULT, SESSION_ENDED, PAGES_COPIED, ORDER_STEP)."""

    # agent -> rank: stage.proto's requests of the same names, except OPEN_SESSION (RunOpen) and CLOSE_SESSION
    ASSIGN = 1
    OFFER_LINK = 2
    CONNECT_LINK = 3
    ACTIVATE = 4
    RELEASE = 5
    OPEN_SESSION = 6
    CLOSE_SESSION = 7
    PREPARE = 8
    RUN = 10
    SHUTDOWN = 11
    """No payload."""
    # rank -> agent
    READY = 20
    """Payload: RankReady."""
    PROGRESS = 21
    """Payload: AssignResponse, under the call's id."""
    REPLY = 22
    """Payload: the call's response."""
    ERROR = 23
    """Payload: Failure. Sent in place of a reply, or of READY."""
    RESULT = 24
    SESSION_ENDED = 25
    """Payload: Failure."""
    LINK_BROKEN = 26
    """Payload: LinkBroken."""
    PAGES_COPIED = 27
    """Payload: PagesCopied."""
    LATE_FRAMES = 28
    """Payload: LateFrames."""
    # rank 0 -> other ranks
    ORDER_STEP = 40
    """Payload: StepOrder."""
    ORDER_CALL = 41
    """An order to carry out the agent's call of this id next. No payload."""

    @property
    def is_call(self) -> bool:
        """Whether the agent waits for a REPLY or an ERROR of the same id."""
        return self < Kind.RUN


READY_ID = 0
"""Id of READY, or of an ERROR in its place."""


def failure_of(error: BaseException) -> worker_pb2.Failure:
    """Converts an error to a message. Unknown exceptions become InternalError."""
    known = error if isinstance(error, StagemeshError) else InternalError(f"{type(error).__name__}: {error}")
    return worker_pb2.Failure(reason=known.reason, message=known.message, retry_after_s=known.retry_after_s)


def error_of(failure: worker_pb2.Failure) -> StagemeshError:
    """Converts a message from `failure_of` back to an error."""
    retry_after_s = failure.retry_after_s if failure.HasField("retry_after_s") else None
    return by_reason(failure.reason)(failure.message, retry_after_s=retry_after_s)
