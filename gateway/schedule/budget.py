"""The number of prompt tokens in a step, and of steps for decode rows.

A step with prompts may take a few times as long as a step with decode rows only.

A pipeline is fast when its steps take equally long: after a step ten times as long, every other stage and every stream
waits. The cost of a step is measured: its compute time on each stage, fitted as a + b * tokens by least squares with
decaying weights. SGLang also sets the chunk sizes of its pipelines by measured costs. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.planning.steps import HOP_S, tokens_per_s

LONGER = 3.0
"""Prompt tokens may add this many times the cost of a step without tokens."""
FORGET = 0.99
"""Factor by which each new step reduces the weight of earlier ones."""
ENOUGH = 8.0
"""Weight of steps that a fit needs."""
OUTLIER = 4.0
"""A step counts with at most this many times its expected time: something else held it up."""
BEFORE = 256
"""Budget in tokens before costs are known."""
GAIN = 1.05
"""One step for all rows must be expected to yield this many times the tokens per second."""
MORE_CORES = 0.5
"""Share of a further core by which a step is faster, before that was measured."""
SMALLEST = 16
"""Smallest budget in tokens. Budgets are multiples of it."""


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
        """(seconds of a step without tokens, seconds per token). None while there is no sensible fit."""
        spread = self.weight * self.tokens_squared - self.tokens**2
        if self.weight < ENOUGH or spread < 1e-6 * self.tokens_squared * self.weight:
            return None
        slope = (self.weight * self.tokens_seconds - self.tokens * self.seconds) / spread
        base = (self.seconds - slope * self.tokens) / self.weight
        return (base, slope) if base > 0 and slope > 0 else None


class StepCosts:
    """The measured costs of steps on each stage, and the budget that follows."""

    def __init__(self) -> None:
        self._stages: dict[int, _Fit] = {}
        self._layers: list[tuple[int, int]] = []
        self._budget = BEFORE

    def add(self, stage: int, tokens: int, seconds: float) -> None:
        """Adds a step: a stage computed `tokens` tokens in `seconds`."""
        self._stages.setdefault(stage, _Fit()).add(tokens, seconds)

    def lines(self) -> list[tuple[float, float]]:
        """(seconds of a step without tokens, seconds per token) of each stage that was measured.

        If all steps of a stage had the same size so far, a token counts as free.
        """
        return [fit.line() or (fit.seconds / fit.weight, 0.0) for _, fit in sorted(self._stages.items())]

    def typical_s(self) -> list[float] | None:
        """Mean seconds of a step on each stage. None while too few steps were measured."""
        fits = [fit for _, fit in sorted(self._stages.items())]
        if not fits or any(fit.weight < ENOUGH for fit in fits):
            return None
        return [fit.seconds / fit.weight for fit in fits]

    def only_for(self, layers: Sequence[tuple[int, int]]) -> None:
        """Sets the layers of the stages. Measurements of other layers are dropped."""
        if self._layers != list(layers):
            self._stages.clear()
        self._layers = list(layers)

    def expected_s(self, tokens: int) -> float | None:
        """Expected seconds of a step, summed over the stages. None while no step of that size was measured."""
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
        """Number of prompt tokens in one step. The stage that they would slow most decides."""
        lines = [line for fit in self._stages.values() if (line := fit.line()) is not None]
        if lines:
            tokens = min(LONGER * base / slope for base, slope in lines)
            self._budget = max(SMALLEST, int(tokens) // SMALLEST * SMALLEST)
        return self._budget


class DecodeSteps:
    """Decides whether all decode rows go into one step, which has all cores, or are spread over the stages.

    One step reads the weights once for all rows, and stages that share a machine compute it in turn, each on all cores.
    Spread rows keep all stages busy at the same time. Measured are steps of the last stage. The stages take equally
    long, as the coordinator divides layers by that.
    """

    def __init__(self) -> None:
        self._beside, self._alone = _Fit(), _Fit()
        self._together = False
        self._layers: tuple[int, int] | None = None

    def only_for(self, layers: tuple[int, int]) -> None:
        """Sets the layers of the last stage. Measurements of other layers are dropped."""
        if self._layers != layers:
            self._beside, self._alone = _Fit(), _Fit()
        self._layers = layers

    def add(self, tokens: int, seconds: float, *, alone: bool) -> None:
        """Adds a step of the last stage. `alone`: it had all cores."""
        (self._alone if alone else self._beside).add(tokens, seconds)

    def best(self, rows: int, most: int, stages: int, more_cores: float) -> int:
        """Returns the number of steps over which to spread `rows` decode rows, 1 or `most`.

        Args:
            rows: number of sequences that decode.
            most: number of steps that may be in flight.
            stages: number of stages.
            more_cores: number of times as many cores that a step has if it runs alone.
        """
        beside, alone = self._beside.line(), self._alone.line()
        known = beside or alone
        if rows < 2 or most == 1 or more_cores <= 1 or known is None:
            return most
        faster = 1 + MORE_CORES * (more_cores - 1)
        spread = _rate(beside or _scaled(known, faster), rows, most, stages)
        together = _rate(alone or _scaled(known, 1 / faster), rows, 1, stages)
        self._together = together > spread * (1 if self._together else GAIN)
        return 1 if self._together else most


def _scaled(line: tuple[float, float], factor: float) -> tuple[float, float]:
    return line[0] * factor, line[1] * factor


def _rate(line: tuple[float, float], rows: int, steps: int, stages: int) -> float:
    """Tokens per second if each stage takes as long as `line` says."""
    return tokens_per_s(lambda share: [line[0] + line[1] * share] * stages, rows, steps, HOP_S)


def share_among(prompts: Sequence[int], budget: int) -> list[int]:
    """Splits a step's `budget` of prompt tokens among prompts. Returns the tokens of each.

    `prompts`: tokens that each has left, the oldest first. The oldest gets all it can use, but only half of the budget
    if others have less left. Of those, the shortest comes first.
    """
    counts = [0] * len(prompts)
    shorter = sorted((i for i, left in enumerate(prompts) if left < prompts[0]), key=prompts.__getitem__)
    most = {0: -(-budget // 2)} if shorter else {}
    for i in [*range(min(1, len(prompts))), *shorter, *range(len(prompts))]:
        more = max(0, min(prompts[i] - counts[i], most.pop(i, budget), budget))
        counts[i] += more
        budget -= more
    return counts
