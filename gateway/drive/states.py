"""The states of a driver, its transitions, and what it remembers.

    WAITING ---wanted--> OPENING --opened--> CROSSING --crossed--> SERVING <--switched, stayed-- SWITCHING
       ^ ^                  |                   |                   |  |                          ^  |
       | `-----refused------´                   |                   |  `----------next------------´  |
       `----------lost (from each of these), not wanted any more (but for SWITCHING)----------------´

The coordinator's view of the pipeline is not a state. It decides which epoch is wanted, and whether requests are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from stagemesh.protos.v1 import types_pb2

DRIVEN = (types_pb2.PIPELINE_STATE_SERVING, types_pb2.PIPELINE_STATE_DRAINING)


class State(Enum):
    """What a driver is doing."""

    WAITING = auto()
    """It drives no epoch."""
    OPENING = auto()
    """It opens sessions on every stage."""
    CROSSING = auto()
    """The sessions are open, and no token has crossed all stages yet."""
    SERVING = auto()
    SWITCHING = auto()
    """It serves, and prepares the next epoch."""


class Event(Enum):
    """Why a driver changes its state."""

    WANTED = auto()
    """There is an epoch to drive."""
    OPENED = auto()
    REFUSED = auto()
    """The sessions could not be opened, or were lost at once."""
    CROSSED = auto()
    LOST = auto()
    UNWANTED = auto()
    """The pipeline drains, and no request runs on it."""
    NEXT = auto()
    """The coordinator has published an epoch to switch to."""
    SWITCHED = auto()
    STAYED = auto()
    """The switch failed, and the driver goes on as before."""


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.WAITING, Event.WANTED): State.OPENING,
    (State.OPENING, Event.OPENED): State.CROSSING,
    (State.OPENING, Event.REFUSED): State.WAITING,
    (State.CROSSING, Event.CROSSED): State.SERVING,
    (State.CROSSING, Event.LOST): State.WAITING,
    (State.CROSSING, Event.UNWANTED): State.WAITING,
    (State.SERVING, Event.LOST): State.WAITING,
    (State.SERVING, Event.UNWANTED): State.WAITING,
    (State.SERVING, Event.NEXT): State.SWITCHING,
    (State.SWITCHING, Event.SWITCHED): State.SERVING,
    (State.SWITCHING, Event.STAYED): State.SERVING,
    (State.SWITCHING, Event.LOST): State.WAITING,
}


@dataclass
class Epochs:
    """What a driver remembers of epochs."""

    driven: int = 0
    """The highest epoch that was opened or switched to. No earlier epoch may emit tokens after it."""
    stayed: int | None = None
    """The last epoch to which the switch failed."""
    refused: int | None = None
    """The last epoch whose sessions could not be opened."""
    refused_since: float = 0.0
    """Clock time of the first failure to open it."""
    retry_at: float = 0.0
    """Clock time of the next attempt to open it."""

    def refuse(self, epoch: int, now: float, again_s: float) -> float:
        """Notes that sessions of an epoch could not be opened. Returns the seconds since the first failure."""
        if self.refused != epoch:
            self.refused, self.refused_since = epoch, now
        self.retry_at = now + again_s
        return now - self.refused_since


@dataclass
class Wish:
    """What the coordinator wants of the pipeline."""

    view: types_pb2.PipelineView | None = field(default_factory=types_pb2.PipelineView)
    """The coordinator's newest view. None: the pipeline was removed."""
    drains_since: float = 0.0
    """Clock time at which it began to drain."""

    @property
    def down(self) -> bool:
        """Whether the pipeline is down or was removed."""
        return self.view is None or self.view.state == types_pb2.PIPELINE_STATE_DOWN

    @property
    def draining(self) -> bool:
        """Whether the pipeline takes no new requests."""
        return self.view is not None and self.view.state == types_pb2.PIPELINE_STATE_DRAINING

    @property
    def leaving(self) -> bool:
        """Whether the pipeline is being removed, or was."""
        return self.view is None or self.view.leaving

    @property
    def driven(self) -> types_pb2.PipelineView | None:
        """The view, if the pipeline can be driven."""
        return self.view if self.view is not None and self.view.state in DRIVEN else None
