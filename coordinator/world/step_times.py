"""The step times that gateways report of one pipeline, and whether they are a reason to move layers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..planning.advice import GAIN, Advice
from ..timing import CoordinatorTiming

LOOKS = 3
"""Number of looks in a row in which other ranges must be better before layers move."""
OUTCOMES = 16
"""Number of outcomes that are kept."""


@dataclass
class Outcome:
    """Result of a change of ranges: seconds of the slowest stage before it, as expected, and after it."""

    epoch: int
    before_s: float
    expected_s: float
    after_s: float = 0.0
    """0: not measured yet."""


@dataclass
class StepTimes:
    """The newest report of each gateway, and what the coordinator concluded from them."""

    epoch: int = 0
    reports: dict[str, tuple[float, list[float]]] = field(default_factory=dict)
    """Gateway -> (clock time, seconds of a decode step on each stage)."""
    outcomes: deque[Outcome] = field(default_factory=lambda: deque(maxlen=OUTCOMES))
    ripe: Advice | None = None
    """Ranges that have been better for long enough to move layers automatically."""
    wanted: Advice | None = None
    """The advice at the time when other ranges were last asked for."""
    _better: int = 0
    _moved_at: float = 0.0

    def note(self, gateway_id: str, epoch: int, seconds: list[float], now: float) -> None:
        """Stores a gateway's report. One of an earlier epoch is ignored."""
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
        """Seconds of a step on each stage, the mean of the gateways' fresh reports. None if there are none."""
        fresh = [s for at, s in self.reports.values() if now - at <= timing.fresh_s and len(s) == stages and min(s) > 0]
        if epoch != self.epoch or not fresh:
            return None
        return [sum(column) / len(fresh) for column in zip(*fresh, strict=True)]

    def look(self, advice: Advice | None, now: float, timing: CoordinatorTiming) -> None:
        """Counts looks in a row at which the gain is large. Sets `ripe` if that lasts and no layers moved recently."""
        if advice is None:
            return
        self._better = self._better + 1 if advice.gain >= GAIN else 0
        last = self.outcomes[-1] if self.outcomes else None
        in_vain = last is not None and last.after_s > last.before_s * (1 - GAIN / 2)
        rest_s = timing.longer_rest_s if in_vain else timing.rest_s
        self.ripe = advice if self._better >= LOOKS and now >= self._moved_at + rest_s else None

    def rest(self, now: float, timing: CoordinatorTiming) -> None:
        """Layers could not move: no automatic move for `longer_rest_s`."""
        self._better, self._moved_at = 0, now + timing.longer_rest_s - timing.rest_s
        self.ripe = self.wanted = None

    def moved(self, epoch: int, advice: Advice, now: float) -> None:
        """Notes that the pipeline has moved to these ranges."""
        self._better, self._moved_at = 0, now
        self.outcomes.append(Outcome(epoch, advice.now_s, advice.then_s))
