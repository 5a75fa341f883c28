"""The states of a driver, what leads from one to another, and what is remembered beside them.

    WAITING ---wanted--> OPENING --opened--> CROSSING --crossed--> SERVING <--switched, stayed-- SWITCHING
       ^ ^                  |                   |                   |  |                          ^  |
       | `-----refused------´                   |                   |  `----------next------------´  |
       `-----------------------lost, not wanted any more (from each of these)-----------------------´

What the coordinator says of the pipeline is no state but a wish: it decides which epoch is wanted, and whether requests
are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from stagemesh.protos.v1 import types_pb2

DRIVEN = (types_pb2.PIPELINE_STATE_SERVING, types_pb2.PIPELINE_STATE_DRAINING)


class State(Enum):
    """Of a driver."""

    WAITING = auto()
    """Nothing is driven."""
    OPENING = auto()
    """Sessions are being opened on every stage."""
    CROSSING = auto()
    """They are open, and no token has crossed all stages yet."""
    SERVING = auto()
    SWITCHING = auto()
    """It serves, and the next epoch is made ready beside that."""


class Event(Enum):
    """What leads from one state to another."""

    WANTED = auto()
    """There is an epoch to drive."""
    OPENED = auto()
    REFUSED = auto()
    """The sessions could not be opened, or were lost at once."""
    CROSSED = auto()
    LOST = auto()
    UNWANTED = auto()
    """It drains, and nothing runs on it."""
    NEXT = auto()
    """The coordinator has published an epoch to switch to."""
    SWITCHED = auto()
    STAYED = auto()
    """It could not switch, and goes on as before."""


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
    """What is remembered of epochs."""

    driven: int = 0
    """The highest that was driven, opened or switched to: no earlier one emits behind it."""
    stayed: int | None = None
    """One that could not be switched to."""
    refused: int | None = None
    """One whose sessions could not be opened, ..."""
    refused_since: float = 0.0
    retry_at: float = 0.0
    """... and when it is tried again."""

    def refuse(self, epoch: int, now: float, again_s: float) -> float:
        """Its sessions could not be opened; for how many seconds that is so by now."""
        if self.refused != epoch:
            self.refused, self.refused_since = epoch, now
        self.retry_at = now + again_s
        return now - self.refused_since


@dataclass
class Wish:
    """What the coordinator says of the pipeline."""

    view: types_pb2.PipelineView | None = field(default_factory=types_pb2.PipelineView)
    """None: it is no more."""
    drains_since: float = 0.0
    """Clock time at which it began to drain."""

    @property
    def down(self) -> bool:
        """There is nothing to make it of."""
        return self.view is None or self.view.state == types_pb2.PIPELINE_STATE_DOWN

    @property
    def draining(self) -> bool:
        """It takes nothing new."""
        return self.view is not None and self.view.state == types_pb2.PIPELINE_STATE_DRAINING

    @property
    def leaving(self) -> bool:
        """It is no more, or is to be no more."""
        return self.view is None or self.view.leaving

    @property
    def driven(self) -> types_pb2.PipelineView | None:
        """The pipeline, where it can be driven."""
        return self.view if self.view is not None and self.view.state in DRIVEN else None
