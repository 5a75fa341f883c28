"""All times of a stage worker. The agent makes one object at its start, each rank another, scaled by `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class StageTiming(Timing):
    """Seconds. Those of the agent first, then those of a rank."""

    # -- the group of ranks ------------------------------------------------------------------------------------------
    ready_s: float = 120.0
    """Until a rank is ready. Time in which it had no core does not count."""
    stop_s: float = 2.0
    """Until ranks have ended that were told to."""
    restart_s: float = 0.1
    """Pause before a group is restarted that died soon after its start. It triples each time, up to the next."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A group that was ready for so long before it died is restarted at once."""
    call_s: float = 20.0
    """Deadline of an order to the ranks that loads nothing."""
    assign_s: float = 1800.0
    """Deadline of an order that loads weights."""
    progress_look_s: float = 0.1
    """Interval of progress reports to the coordinator."""

    # -- the watchdog (agent/watchdog.py, rank/heartbeat.py) -----------------------------------------------------------
    look_s: float = 0.1
    """Interval at which the watchdog looks at the ranks."""
    alive_s: float = 0.4
    """Interval within which an idle rank writes a heartbeat."""
    stuck_s: float = 0.6
    """Beyond `alive_s`: a rank that is stopped for so long hangs, and so does a group of which no rank runs for so
    long. Tools that look into a process stop it for less."""
    order_stuck_s: float = 15.0
    """The same within an order, or before the ranks are ready: a file system or a name service may be slow."""
    order_sign_s: float = 120.0
    """Interval within which an order writes a heartbeat: it may import modules, or read a large tensor."""
    first_step_s: float = 30.0
    """For a stretch of a step smaller than any before: much is initialized at its first use."""
    cuda_step_s: float = 5.0
    """Added on a CUDA device, where a decode step of a new size is captured first."""
    beside_load_s: float = 2.0
    """Added while weights are loaded beside steps."""
    late_s: float = 3.0
    """Added for a rank that is late but runs."""

    # -- the coordinator ---------------------------------------------------------------------------------------------
    coordinator_call_s: float = 5.0
    """Deadline of a call to the coordinator."""
    register_again_s: float = 0.3
    """Pause between two tries to register."""
    silence_s: float = 2.0
    """Until a worker that is not registered warns. The interval doubles each time, up to `silence_most_s`."""
    silence_most_s: float = 60.0
    lateness_half_life_s: float = 2.0
    """In which the measured lateness of this worker halves."""
    stream_end_s: float = 1.0
    """Until a stream has ended that was cancelled."""
    released_s: float = 1.0
    """Until the coordinator has released a worker whose gateways have left it."""
    drain_again_s: float = 1.0
    """Interval of repeated drain requests: a coordinator may have restarted without its state."""
    drain_look_s: float = 0.05
    """Interval at which the end of a drain is checked."""

    # -- a rank ------------------------------------------------------------------------------------------------------
    spin_s: float = 50e-6
    """How long an idle rank polls before it sleeps: the next activation is usually microseconds away."""
    idle_s: float = 0.2
    """Longest sleep of an idle rank."""
    links_look_s: float = 0.01
    """Longest sleep while a handshake is under way: no descriptor signals its deadline."""
    pages_look_s: float = 0.001
    """Longest sleep while a thread writes pages that arrived."""
    link_s: float = 4.0
    """Deadline of a link's handshake."""
    order_s: float = 30.0
    """Until the inputs for an order of rank 0 are here."""
    peers_s: float = 60.0
    """Wait for the other ranks of a group, in a sum or at their first meeting."""
    write_s: float = 30.0
    """Until the reader of a rank's control socket reads."""
    results_s: float = 0.05
    """Longest wait of a step's timings for others."""
    progress_s: float = 0.05
    """Interval of a rank's messages about a load."""
    load_sign_s: float = 1.0
    """Interval of progress while an order waits for a load."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """See `Timing`."""
        yield self.restart_s < self.restart_most_s, "restart_s < restart_most_s"
        yield self.idle_s < self.alive_s, "idle_s < alive_s: an idle rank writes in time"
        yield self.look_s < self.alive_s / 2, "look_s < alive_s / 2"
        yield self.stuck_s < self.order_stuck_s < self.order_sign_s, "stuck_s < order_stuck_s < order_sign_s"
        yield self.link_s < self.call_s, "link_s < call_s: a handshake ends before the order that it is a part of"
        yield (
            self.order_s < self.peers_s,
            "order_s < peers_s: who cannot carry out an order ends before who waits for it",
        )
