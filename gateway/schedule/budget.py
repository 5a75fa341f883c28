"""How many prompt tokens go into a step: so many that it lasts a few times as long as a step of decode rows alone.

A pipeline is as fast as its steps are alike: behind a step ten times as long every other stage waits, and so does every
stream. What a step costs is measured: compute time on each stage, fitted as a + b * tokens by least squares that forget
(dynamic chunk sizes from measured costs are also SGLang's, for its pipelines). Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONGER = 3.0
"""By how many times the cost of a step of no prompt tokens a step may grow for the sake of prompts."""
FORGET = 0.99
"""Weight of everything seen before, for each step."""
ENOUGH = 8.0
"""Weight of steps seen that a fit takes."""
OUTLIER = 4.0
"""A step that took so many times what was expected was held up by something else; so much of it counts."""
BEFORE = 256
SMALLEST = 16
"""Tokens: before anything is known; and in any case, in this multiple."""


@dataclass
class _Fit:
    weight: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    tokens_seconds: float = 0.0
    most_tokens: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        line = self.line()
        if line is not None:
            seconds = min(seconds, OUTLIER * (line[0] + line[1] * tokens))
        self.most_tokens = max(self.most_tokens, tokens)
        self.weight = self.weight * FORGET + 1
        self.tokens = self.tokens * FORGET + tokens
        self.seconds = self.seconds * FORGET + seconds
        self.tokens_squared = self.tokens_squared * FORGET + tokens * tokens
        self.tokens_seconds = self.tokens_seconds * FORGET + tokens * seconds

    def line(self) -> tuple[float, float] | None:
        """(seconds of a step without tokens, seconds a token); None while it is not known, or makes no sense."""
        spread = self.weight * self.tokens_squared - self.tokens**2
        if self.weight < ENOUGH or spread < 1e-6 * self.tokens_squared * self.weight:
            return None
        slope = (self.weight * self.tokens_seconds - self.tokens * self.seconds) / spread
        base = (self.seconds - slope * self.tokens) / self.weight
        return (base, slope) if base > 0 and slope > 0 else None


class StepCosts:
    """What steps cost on each stage, and the budget that follows."""

    def __init__(self) -> None:
        self._stages: dict[int, _Fit] = {}
        self._layers: list[tuple[int, int]] = []
        self._budget = BEFORE

    def add(self, stage: int, tokens: int, seconds: float) -> None:
        """A step of so many tokens computed for so long on a stage."""
        self._stages.setdefault(stage, _Fit()).add(tokens, seconds)

    def lines(self) -> list[tuple[float, float]]:
        """(seconds of a step without tokens, seconds a token) of each stage seen.

        A stage whose steps were all alike so far is taken for one where a token costs nothing.
        """
        return [fit.line() or (fit.seconds / fit.weight, 0.0) for _, fit in sorted(self._stages.items())]

    def typical_s(self) -> list[float] | None:
        """Seconds of a step of the size that steps have, on each stage; None while few were seen."""
        fits = [fit for _, fit in sorted(self._stages.items())]
        if not fits or any(fit.weight < ENOUGH for fit in fits):
            return None
        return [fit.seconds / fit.weight for fit in fits]

    def only_for(self, layers: Sequence[tuple[int, int]]) -> None:
        """The stages hold these layers: what is known of others is of no use."""
        if self._layers != list(layers):
            self._stages.clear()
        self._layers = list(layers)

    def expected_s(self, tokens: int) -> float | None:
        """Seconds of a step of so many tokens, one stage after the other; None while nothing like it was seen."""
        total_s = 0.0
        for fit in self._stages.values():
            line = fit.line()
            if line is not None:
                total_s += line[0] + line[1] * tokens
            elif fit.weight >= ENOUGH and tokens <= fit.most_tokens:
                total_s += fit.seconds / fit.weight
            else:
                return None
        return total_s if self._stages else None

    def prefill_budget(self) -> int:
        """Prompt tokens of one step, by the stage that would be slowed most."""
        lines = [line for fit in self._stages.values() if (line := fit.line()) is not None]
        if lines:
            tokens = min(LONGER * base / slope for base, slope in lines)
            self._budget = max(SMALLEST, int(tokens) // SMALLEST * SMALLEST)
        return self._budget


def share_among(prompts: Sequence[int], budget: int) -> list[int]:
    """Prompt tokens of one step, of prompts with so many left, the oldest first: it gets all it can, but for half of
    the `budget` where others have less left; of those the shortest comes first."""
    counts = [0] * len(prompts)
    shorter = sorted((i for i, left in enumerate(prompts) if left < prompts[0]), key=prompts.__getitem__)
    most = {0: -(-budget // 2)} if shorter else {}
    for i in [*range(min(1, len(prompts))), *shorter, *range(len(prompts))]:
        more = max(0, min(prompts[i] - counts[i], most.pop(i, budget), budget))
        counts[i] += more
        budget -= more
    return counts
