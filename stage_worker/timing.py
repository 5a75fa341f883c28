"""Every time of a stage worker: made once where it starts, and once in each rank, from `--time-scale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class StageTiming(Timing):
    """Of the agent, then of a rank."""

    # -- the group of ranks ------------------------------------------------------------------------------------------
    ready_s: float = 120.0
    """What a rank may take until it is up; time in which it had no core does not count."""
    stop_s: float = 2.0
    """What ranks may take to end when they are told to."""
    restart_s: float = 0.1
    """Before a group that died soon after its start is started again; three times as long each time, up to the next."""
    restart_most_s: float = 5.0
    stable_s: float = 5.0
    """A group that was up for so long before it died does not count as failing."""
    call_s: float = 20.0
    """An order to the ranks that loads nothing."""
    assign_s: float = 1800.0
    """An order that loads weights."""
    progress_look_s: float = 0.1
    """How often the coordinator is told how far a load is."""

    # -- the watchdog (agent/watchdog.py, rank/heartbeat.py) -----------------------------------------------------------
    look_s: float = 0.1
    """How often the ranks are looked at."""
    alive_s: float = 0.4
    """A rank that has nothing to do, or very little, is heard of within this time."""
    stuck_s: float = 0.6
    """So much longer a rank may be stopped, or no rank of a group run: one that waits for another does so while that
    one runs. Whoever looks at a rank with a debugger's means stops it for less."""
    order_stuck_s: float = 15.0
    """How long no rank may run within an order, or before it is up: a file system, or a name, may be on the network."""
    order_sign_s: float = 120.0
    """What an order may take between two signs of life: to import a model's modules, a large tensor."""
    first_step_s: float = 30.0
    """A stretch of a step smaller than any before: much is made when it is needed for the first time."""
    cuda_step_s: float = 5.0
    """Beyond its own on a CUDA device: a decode step of a new size is captured first."""
    beside_load_s: float = 2.0
    """Beyond its own while weights are loaded beside steps."""
    late_s: float = 3.0
    """So much longer a rank may take that is late and runs."""

    # -- the coordinator ---------------------------------------------------------------------------------------------
    coordinator_call_s: float = 5.0
    """A call to the coordinator."""
    register_again_s: float = 0.3
    """Between two tries to register."""
    silence_s: float = 2.0
    """A worker that is not registered by then says so; twice as long each time until it does again, up to the next."""
    silence_most_s: float = 60.0
    lateness_half_life_s: float = 2.0
    """In which half of how late this worker was is forgotten."""
    stream_end_s: float = 1.0
    """How long a stream that is called off may take to end."""
    released_s: float = 1.0
    """How long the coordinator may take to release a worker whose gateways have left it."""
    drain_again_s: float = 1.0
    """Between two asks for a drain: a coordinator that was started again without its state has forgotten the first."""
    drain_look_s: float = 0.05
    """How often it is looked whether a drain is done."""

    # -- a rank ------------------------------------------------------------------------------------------------------
    spin_s: float = 50e-6
    """How long a rank that ran dry goes on looking: the next activation is usually microseconds away."""
    idle_s: float = 0.2
    """How long an idle rank sleeps."""
    links_look_s: float = 0.01
    """How often links are looked at while a handshake is under way: its deadline has no descriptor."""
    pages_look_s: float = 0.001
    """How often pages are looked at that a thread puts where they belong."""
    link_s: float = 4.0
    """A handshake over a link."""
    order_s: float = 30.0
    """How long a rank may lack what it needs to carry out an order of rank 0."""
    peers_s: float = 60.0
    """How long a rank waits for the others of its group, in a sum or when they first meet."""
    write_s: float = 30.0
    """How long an agent, or a rank, may leave what a rank writes unread."""
    results_s: float = 0.05
    """How long a step's timings may wait for others."""
    progress_s: float = 0.05
    """Between two messages of the progress of a load."""
    load_sign_s: float = 1.0
    """How often progress is told while all wait for a load."""

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
