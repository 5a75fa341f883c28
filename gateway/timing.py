"""The gateway's times, and how they depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class GatewayTiming(Timing):
    """What the gateway waits for, and how long. Times that an operator sets one by one are in its settings."""

    # A pipeline is driven.
    retry_s: float = 0.2
    """Between two looks at what can be driven, and two tries to reach the coordinator."""
    again_s: float = 0.5
    """Between two tries to open sessions of one epoch: each takes a slot, and there are 250 a minute."""
    in_vain_s: float = 3.0
    """So long sessions of an epoch that serves may fail to open before the coordinator hears of it."""
    retry_after_s: float = 2.0
    """When a client that was refused had better come again."""
    finish_s: float = 30.0
    """So long a pipeline that drains may finish what it runs, before another one does."""
    patience_s: float = 5.0
    """So long a lost pipeline is waited for where another one serves: to go on there, all has to be computed again."""
    open_s: float = 25.0
    """What a worker may take to open a session."""
    reach_s: float = 2.5
    """How long an attempt to connect takes at most, and a little."""
    last_words_s: float = 0.3
    """So long workers of an epoch that was lost may still say why: that a rank died is known behind the broken link."""
    end_s: float = 0.2
    """How long a worker that is told that a stream is over may take to end it."""

    # Steps.
    look_s: float = 0.2
    """Between two looks for steps that do not come back."""
    step_timeout_s: float = 60.0
    """A step that is out longer means a link or a worker that hangs with its sockets open."""
    step_slack_s: float = 1.0
    """Once steps were measured: so long beyond `STEP_MARGIN` times what all that are out should take."""
    recovering_s: float = 20.0
    """The same before a token has crossed, and while stages are refilled: what steps took says nothing then."""

    # A pipeline goes over to its next epoch.
    copy_s: float = 50.0
    """How long all copying of pages may take while steps go on."""
    pause_s: float = 5.0
    """How long the steps that are out may take to come back when nothing more is planned."""

    # The coordinator is told.
    report_s: float = 5.0
    """One report."""
    away_s: float = 60.0
    """So long a coordinator is waited for. What is said of an epoch that has passed by then changes nothing."""
    steps_every_s: float = 2.0
    """Between two reports of what steps take."""

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
        yield 3 * self.look_s < self.step_slack_s, "3 look_s < step_slack_s: a late look blames nobody"
        yield (
            self.step_slack_s < self.recovering_s <= self.step_timeout_s,
            "step_slack_s < recovering_s <= step_timeout_s",
        )
        yield self.retry_s <= self.again_s < self.in_vain_s, "retry_s <= again_s < in_vain_s"
        yield self.reach_s < self.in_vain_s, "reach_s < in_vain_s"
        yield self.pause_s < self.copy_s, "pause_s < copy_s"
        yield self.patience_s < self.finish_s, "patience_s < finish_s"
        yield self.linger_s <= self.body_s, "linger_s <= body_s: what is refused is not taken longer than what is read"
        yield self.stream_sweep_s < self.stream_kept_s, "stream_sweep_s < stream_kept_s"
        yield self.grpc_stop_s <= self.http_stop_s, "grpc_stop_s <= http_stop_s: both end within one stop"
