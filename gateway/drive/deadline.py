"""Whether steps that are out come back in time. Pure; the clock is an argument."""

from __future__ import annotations

from ..timing import GatewayTiming

STEP_MARGIN = 20.0
"""Steps may take so many times what they were measured to take."""


class StepDeadline:
    """When steps went out, and when one came back last."""

    def __init__(self, timing: GatewayTiming) -> None:
        self._timing = timing
        self._sent_at: dict[int, float] = {}
        self._heard_at = 0.0
        self._looked_at = 0.0

    @property
    def watches(self) -> bool:
        """Whether a step is out."""
        return bool(self._sent_at)

    def sent(self, step: int, now: float) -> None:
        """A step went out."""
        self._sent_at[step] = now

    def done(self, step: int, now: float) -> None:
        """A step came back from the last stage that runs it."""
        del self._sent_at[step]
        self._heard_at = now

    def out_s(self, now: float) -> float:
        """For how long nothing has come back, while steps are out. To be asked every `look_s`."""
        late, self._looked_at = now - self._looked_at > 3 * self._timing.look_s, now
        if late:
            # This process was not run: what has come meanwhile may not have been taken yet.
            self._heard_at = now
        oldest = min(self._sent_at.values(), default=None)
        return 0.0 if oldest is None else now - max(oldest, self._heard_at)

    def most_s(self, expected_s: float | None, *, measured: bool) -> float:
        """How long that may be. `expected_s`: what all that are out should take, where that is known; `measured`: what
        steps took says something of these."""
        timing = self._timing
        if not measured:
            return timing.recovering_s
        if expected_s is None:
            return timing.step_timeout_s
        return min(timing.step_timeout_s, timing.step_slack_s + STEP_MARGIN * expected_s)
