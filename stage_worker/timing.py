"""All times of a stage worker. The agent and each rank make one object at their start, scaled by `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class StageTiming(Timing):
    """Times in seconds. The agent's come first, then the ranks'."""

    # -- the group of ranks ------------------------------------------------------------------------------------------
    ready_s: float = 120.0
    """Time until a rank must be ready. Time in which it had no core does not count."""
    stop_s: float = 2.0
    """Time until ranks that were told to end must have ended."""
    restart_s: float = 0.1
    """Pause before a group that died soon after its start is restarted. It triples up to `restart_most_s`."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A group that was ready for this long before it died is restarted at once."""
    call_s: float = 20.0
    """Deadline of an order to the ranks that loads nothing."""
    assign_s: float = 1800.0
    """Deadline of an order that loads weights."""
    fetch_silence_s: float = 150.0
    """Longest time without a byte of files that are fetched from a hub. It covers several requests that time out."""
    progress_look_s: float = 0.1
    """Interval of progress reports to the coordinator."""

    # -- the watchdog (agent/watchdog.py, rank/heartbeat.py) -----------------------------------------------------------
    look_s: float = 0.1
    """Interval at which the watchdog looks at the ranks."""
    alive_s: float = 0.4
    """Longest interval between heartbeats of an idle rank."""
    stuck_s: float = 0.6
    """Time beyond `alive_s` after which a stopped rank hangs. A group hangs if none of its ranks runs for this long.
    Tools that inspect a process stop it for less."""
    order_stuck_s: float = 15.0
    """`stuck_s` during an order, or before the ranks are ready: a file system or a name service may be slow."""
    order_sign_s: float = 120.0
    """Longest interval between heartbeats during an order: it may import modules, or read a large tensor."""
    first_step_s: float = 30.0
    """Longest time between heartbeats in a step that is smaller than any before: much is initialized at first use."""
    cuda_step_s: float = 5.0
    """Time added on a CUDA device, where the first decode step of each size is captured."""
    beside_load_s: float = 2.0
    """Time added while weights are loaded beside steps."""
    late_s: float = 3.0
    """Time added for a rank that is late but runs."""

    # -- the coordinator ---------------------------------------------------------------------------------------------
    coordinator_call_s: float = 5.0
    """Deadline of a call to the coordinator."""
    register_again_s: float = 0.3
    """Pause between two tries to register."""
    silence_s: float = 2.0
    """Time until an unregistered worker logs a warning. The interval doubles each time, up to `silence_most_s`."""
    silence_most_s: float = 60.0
    lateness_half_life_s: float = 2.0
    """Time in which the measured lateness of this worker halves."""
    stream_end_s: float = 1.0
    """Longest wait for the end of a cancelled stream."""
    released_s: float = 1.0
    """Time for the coordinator to release a worker that its gateways have left."""
    drain_again_s: float = 1.0
    """Interval of repeated drain requests: the coordinator may have restarted without its state."""
    drain_look_s: float = 0.05
    """Interval of checks whether a drain has ended."""

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
    """Deadline of a link handshake."""
    order_s: float = 30.0
    """Deadline for the inputs of an order from rank 0."""
    peers_s: float = 60.0
    """Longest wait for the other ranks of a group, in a sum or when the group is formed."""
    write_s: float = 30.0
    """Longest wait until the reader of a rank's control socket reads."""
    results_s: float = 0.05
    """Longest time that a step's timings wait for those of other steps."""
    progress_s: float = 0.05
    """Interval of a rank's progress messages about a load."""
    load_sign_s: float = 1.0
    """Interval of progress reports while an order waits for a load."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """Yields the relations between these times; see `Timing`."""
        yield self.restart_s < self.restart_most_s, "restart_s < restart_most_s"
        yield self.idle_s < self.alive_s, "idle_s < alive_s: an idle rank writes in time"
        yield self.look_s < self.alive_s / 2, "look_s < alive_s / 2"
        yield self.stuck_s < self.order_stuck_s < self.order_sign_s, "stuck_s < order_stuck_s < order_sign_s"
        yield self.link_s < self.call_s, "link_s < call_s: a handshake ends before the order that it is a part of"
        yield (
            self.order_s < self.peers_s,
            "order_s < peers_s: who cannot carry out an order ends before who waits for it",
        )
