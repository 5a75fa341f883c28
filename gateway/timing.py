"""The gateway's time-outs and intervals, and the relations between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class GatewayTiming(Timing):
    """All times are in seconds. Times that an operator may set one by one are in the settings."""

    # Driving a pipeline.
    retry_s: float = 0.2
    """Interval between checks of what can be driven, and between attempts to reach the coordinator."""
    again_s: float = 0.5
    """Shortest pause between attempts to open one epoch's sessions: each takes a slot, and there are 250 a minute."""
    in_vain_s: float = 3.0
    """How long sessions of a serving epoch may fail to open before the gateway reports it to the coordinator."""
    retry_after_s: float = 2.0
    """Retry-After of a refused request."""
    finish_s: float = 30.0
    """How long a draining pipeline may finish its requests before they move to another one."""
    patience_s: float = 5.0
    """How long requests wait for a lost pipeline if another one serves: there they must be computed again."""
    open_s: float = 25.0
    """How long a worker may take to open a session."""
    reach_s: float = 2.5
    """A little more than the longest attempt to connect."""
    last_words_s: float = 0.3
    """How long workers of a lost epoch may still say why: the death of a rank is known later than the broken link."""
    end_s: float = 0.2
    """How long a worker may take to end a stream that the gateway has ended."""

    # Steps.
    look_s: float = 0.2
    """Interval between checks for steps that do not come back."""
    step_timeout_s: float = 60.0
    """Longest time without a result while steps are in flight: after it a link or a worker hangs with open sockets."""
    step_slack_s: float = 1.0
    """Once steps are measured, the time without a result may exceed `STEP_MARGIN` times the expected one by this."""
    recovering_s: float = 20.0
    """Longest time without a result before a token has crossed, and while stages are refilled: measurements do not
    apply then."""

    # Switching to a next epoch.
    copy_s: float = 50.0
    """How long all copying of pages may take while steps go on."""
    pause_s: float = 5.0
    """How long steps in flight may take to come back after planning stops."""

    # Reports to the coordinator.
    report_s: float = 5.0
    """Time-out of one report."""
    away_s: float = 60.0
    """How long a report is repeated while the coordinator is away. A late report of a past epoch changes nothing."""
    steps_every_s: float = 2.0
    """Interval between reports of step times."""

    # Clients' connections (api/http).
    body_s: float = 60.0
    """How long a request's body may take to arrive."""
    write_s: float = 60.0
    """How long a client may take to read what was written. After it, its connection is dropped."""
    linger_s: float = 10.0
    """How long the rest of a body that is too large is read and dropped, while the client reads the answer."""
    linger_bytes: int = 256 << 20
    """Most bytes of such a body that are read and dropped."""
    keep_alive_s: float = 30.0
    """How long a connection without a request is kept."""

    # Streams on disk (api/token_log.py).
    stream_kept_s: float = 3600.0
    """How long a stream can be resumed after its last token."""
    stream_sweep_s: float = 60.0
    """Shortest interval between searches for older streams."""

    # The process (main.py).
    health_look_s: float = 0.1
    """Interval between updates of grpc.health.v1."""
    http_stop_s: float = 1.0
    """How long HTTP connections may take to end at a stop, when all requests have ended."""
    grpc_stop_s: float = 0.5
    """How long gRPC calls may take to end at a stop."""

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
