"""Checks whether steps in flight come back in time. Pure; the clock is an argument."""

from __future__ import annotations

from ..timing import GatewayTiming

STEP_MARGIN = 20.0
"""Steps may take this many times their expected time."""


class StepDeadline:
    """Notes when steps are sent and come back, and says for how long none has come back."""

    def __init__(self, timing: GatewayTiming) -> None:
        self._timing = timing
        self._sent_at: dict[int, float] = {}
        self._heard_at = 0.0
        self._looked_at = 0.0

    @property
    def watches(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._sent_at)

    def sent(self, step: int, now: float) -> None:
        """A step was sent."""
        self._sent_at[step] = now

    def done(self, step: int, now: float) -> None:
        """The last stage that runs a step has sent its result."""
        del self._sent_at[step]
        self._heard_at = now

    def out_s(self, now: float) -> float:
        """Seconds since a step last came back, while steps are in flight. Call it every `look_s`."""
        late, self._looked_at = now - self._looked_at > 3 * self._timing.look_s, now
        if late:
            # This process was stopped for a while. Results may have arrived that it has not read yet.
            self._heard_at = now
        oldest = min(self._sent_at.values(), default=None)
        return 0.0 if oldest is None else now - max(oldest, self._heard_at)

    def most_s(self, expected_s: float | None, *, measured: bool) -> float:
        """The limit of `out_s`.

        `expected_s`: expected time of all steps in flight, if known. `measured`: whether measured step times apply now.
        """
        timing = self._timing
        if not measured:
            return timing.recovering_s
        if expected_s is None:
            return timing.step_timeout_s
        return min(timing.step_timeout_s, timing.step_slack_s + STEP_MARGIN * expected_s)
