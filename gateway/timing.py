"""The gateway's times, and how they depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.timing import Timing


@dataclass(frozen=True)
class GatewayTiming(Timing):
    """Seconds."""

    # A pipeline is driven.
    retry_s: float = 0.2
    """Between two looks at what can be driven, and two tries to reach the coordinator."""
    again_s: float = 0.5
    """Between two tries to open sessions of one epoch: each takes a slot, and there are 250 a minute."""
    in_vain_s: float = 3.0
    """So long sessions of an epoch that serves may fail to open before the coordinator hears of it."""
    warm_up_s: float = 120.0
    """What the first token across all stages may take."""
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

    def relations(self) -> Iterator[tuple[bool, str]]:
        """What must hold between them."""
        yield 3 * self.look_s < self.step_slack_s, "3 look_s < step_slack_s: a late look blames nobody"
        yield (
            self.step_slack_s < self.recovering_s <= self.step_timeout_s,
            "step_slack_s < recovering_s <= step_timeout_s",
        )
        yield self.retry_s <= self.again_s < self.in_vain_s, "retry_s <= again_s < in_vain_s"
        yield self.reach_s < self.in_vain_s, "reach_s < in_vain_s"
        yield self.pause_s < self.copy_s, "pause_s < copy_s"
        yield self.patience_s < self.finish_s, "patience_s < finish_s"
