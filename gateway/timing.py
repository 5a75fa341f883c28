"""Times of the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class GatewayTiming(Timing):
    """What the gateway waits for, and how long. Times that an operator sets one by one are in its settings."""

    # Clients' connections (api/http).
    body_s: float = 60.0
    """Until a request's body must be there."""
    write_s: float = 60.0
    """Until a reader must have taken what was written; then its connection is dropped."""
    linger_s: float = 10.0
    """How long the rest of a body that is too large is taken and dropped, while the client reads the answer."""
    linger_bytes: int = 256 << 20
    """How much of it, at most."""
    keep_alive_s: float = 30.0
    """How long a connection without a request is kept."""

    # Streams on disk (api/token_log.py).
    stream_kept_s: float = 3600.0
    """How long a stream can be resumed after its last token."""
    stream_sweep_s: float = 60.0
    """Between two looks for streams that are older."""

    # The process (main.py).
    health_look_s: float = 0.1
    """Between two looks at whether grpc.health.v1 must change."""
    http_stop_s: float = 1.0
    """What a stop gives HTTP connections when all requests have ended."""
    grpc_stop_s: float = 0.5
    """What it gives gRPC calls."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.linger_s <= self.body_s, "linger_s <= body_s: what is refused is not taken longer than what is read"
        yield self.stream_sweep_s < self.stream_kept_s, "stream_sweep_s < stream_kept_s"
        yield self.grpc_stop_s <= self.http_stop_s, "grpc_stop_s <= http_stop_s: both end within one stop"
