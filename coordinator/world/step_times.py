"""What gateways report of one pipeline's steps, and whether that is a reason to move layers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..planning.advice import GAIN, Advice
from ..timing import CoordinatorTiming

LOOKS = 3
"""Other ranges must be better in so many looks, one after the other."""
OUTCOMES = 16


@dataclass
class Outcome:
    """A change of ranges: what the slowest stage took, what was expected of the change, and what came."""

    epoch: int
    before_s: float
    expected_s: float
    after_s: float = 0.0
    """0: not measured yet."""


@dataclass
class StepTimes:
    """The newest report of each gateway, and the looks at them."""

    epoch: int = 0
    reports: dict[str, tuple[float, list[float]]] = field(default_factory=dict)
    """Gateway -> (clock time, seconds of a decode step on each stage)."""
    outcomes: deque[Outcome] = field(default_factory=lambda: deque(maxlen=OUTCOMES))
    ripe: Advice | None = None
    """Ranges that have been better for long enough to move layers by themselves."""
    wanted: Advice | None = None
    """What was known when other ranges were wanted last."""
    _better: int = 0
    _moved_at: float = 0.0

    def note(self, gateway_id: str, epoch: int, seconds: list[float], now: float) -> None:
        """A gateway's report; one of an earlier epoch says nothing."""
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch = epoch
            self.reports.clear()
        self.reports[gateway_id] = now, seconds
        latest = self.outcomes[-1] if self.outcomes else None
        if latest is not None and latest.epoch == epoch:
            latest.after_s = max(seconds)

    def seconds(self, epoch: int, stages: int, now: float, timing: CoordinatorTiming) -> list[float] | None:
        """The mean over the gateways' fresh reports; None while nothing is known."""
        fresh = [s for at, s in self.reports.values() if now - at <= timing.fresh_s and len(s) == stages and min(s) > 0]
        if epoch != self.epoch or not fresh:
            return None
        return [sum(column) / len(fresh) for column in zip(*fresh, strict=True)]

    def look(self, advice: Advice | None, now: float, timing: CoordinatorTiming) -> None:
        """Counts looks at which much would be gained; `ripe` when that lasts, and nothing moved of late."""
        if advice is None:
            return
        self._better = self._better + 1 if advice.gain >= GAIN else 0
        last = self.outcomes[-1] if self.outcomes else None
        in_vain = last is not None and last.after_s > last.before_s * (1 - GAIN / 2)
        rest_s = timing.longer_rest_s if in_vain else timing.rest_s
        self.ripe = advice if self._better >= LOOKS and now >= self._moved_at + rest_s else None

    def rest(self, now: float, timing: CoordinatorTiming) -> None:
        """Layers could not move: not again for long."""
        self._better, self._moved_at = 0, now + timing.longer_rest_s - timing.rest_s
        self.ripe = self.wanted = None

    def moved(self, epoch: int, advice: Advice, now: float) -> None:
        """The pipeline has gone to these ranges."""
        self._better, self._moved_at = 0, now
        self.outcomes.append(Outcome(epoch, advice.now_s, advice.then_s))
