"""Guesses of a draft model on the last stage: when to ask for them, and for how many.

A round with k guesses yields 1 + c + ... + c^k tokens if each guess is right with chance c. It takes one pass of its
rows and guesses over the stages, and k steps of the draft model on the last stage. With several rounds in flight, a
round costs its share of that, or the time of the slowest stage. Costs are measured, and so is c, for each sequence. The
k with the most tokens per second is used. It is often 0: then one guess is tried from time to time, to notice when
guessing begins to pay. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagemesh.planning.steps import interval_s

from .sequence import Sequence
from .speculation import Guesser

AT_FIRST = 0.7
"""Assumed chance that a guessed token is right, before anything is measured."""
WEIGHT = 0.1
"""Weight of the newest guessed token in a sequence's mean."""
LIKELY = 0.3
"""While costs are not known, a guess grows as long as the chance that all of it is right is more than this."""
NEWEST = 0.05
"""Weight of the newest step in the mean cost of a guess."""
WEIGHT_OF_ALL = 0.02
"""Weight of the newest guessed token in the mean over all sequences."""
WORTH = 1.1
"""Guessing must yield this many times the tokens per second: without it, a step need not wait until the gateway knows
the token of the step before."""
TRY_EVERY = 64
"""Number of rows between two tries while guessing does not pay."""


@dataclass
class GuessCosts:
    """Measured costs of steps and guesses."""

    stages: list[tuple[float, float]] = field(default_factory=list)
    """(seconds of a step without tokens, seconds per token) of each stage. Empty: not known yet."""
    guess_s: float = 0.0
    """Seconds of one more guess for each row of a step. 0: not known yet."""

    def add(self, guesses: int, seconds: float) -> None:
        """Adds a step in which each row got up to `guesses` guesses, which took `seconds`."""
        each = seconds / max(1, guesses)
        self.guess_s += NEWEST * (each - self.guess_s) if self.guess_s else each

    def round_s(self, guesses: int, streams: int, batches: int) -> float:
        """Seconds of the pipeline that a step of decode rows takes, with this many guesses for each row."""
        rows, at_once = -(-streams // batches), min(streams, batches)
        stages = [base + each * rows * (1 + guesses) for base, each in self.stages]
        stages[-1] += guesses * self.guess_s
        return interval_s(stages, at_once)


@dataclass
class _Guessed:
    """What is known of one sequence."""

    chance: float | None = None
    """Chance that a guessed token is right. None: none was verified yet."""
    asked: bool = False
    """Whether the last stage was asked for guesses and has not answered."""
    pays: bool = False
    """Whether those guesses are expected to pay. Otherwise they are a try."""
    tokens: tuple[int, list[int]] = (0, [])
    """Length of the sequence when the guesses came, and the guesses for the tokens after it."""


NOTHING = _Guessed()


class DraftModelGuesser(Guesser):
    """The last stage's guesses, and what to ask it for."""

    def __init__(self, num_tokens: int, batches: int, costs: GuessCosts) -> None:
        """`num_tokens`: most guesses at a time. `batches`: number of batches that rows are spread over. The caller
        keeps `costs` up to date."""
        self._num_tokens = num_tokens
        self._batches = batches
        self._costs = costs
        self._known: dict[Sequence, _Guessed] = {}
        self._until_try = TRY_EVERY
        """Number of rows until the next try."""
        self._mean = AT_FIRST
        """Mean chance over all verified guesses. New sequences begin with it."""

    def __len__(self) -> int:
        """Number of sequences that something is known of."""
        return len(self._known)

    def _chance(self, known: _Guessed) -> float:
        return self._mean if known.chance is None else known.chance

    def guess(self, sequence: Sequence) -> list[int]:
        """The guesses for the tokens after the known ones."""
        length, guesses = self._known.get(sequence, NOTHING).tokens
        return guesses if length == sequence.length else []

    def waits(self, sequence: Sequence) -> bool:
        """Whether guesses will come with the token that is in flight."""
        return self._known.get(sequence, NOTHING).asked

    def gathers(self, sequence: Sequence) -> bool:
        """Whether guesses will come and pay. A try delays no other sequence."""
        known = self._known.get(sequence, NOTHING)
        return known.asked and known.pays

    def ask(self, sequence: Sequence, streams: int) -> int:
        """Number of tokens to guess after the next one."""
        known = self._known.setdefault(sequence, _Guessed())
        wanted = best_count(self._chance(known), self._num_tokens, self._costs, streams, self._batches)
        if wanted:
            known.asked = known.pays = True
            return wanted
        self._until_try -= 1
        if self._until_try > 0:
            return 0
        self._until_try = TRY_EVERY
        known.asked, known.pays = True, False
        return 1

    def told(self, sequence: Sequence, guesses: list[int]) -> None:
        """Takes the last stage's guesses."""
        known = self._known.setdefault(sequence, _Guessed())
        known.asked, known.tokens = False, (sequence.length, guesses)

    def verified(self, sequence: Sequence, guessed: int, held: int) -> None:
        """Updates the chance by the guesses up to the first wrong one. Later ones say nothing."""
        known = self._known.setdefault(sequence, _Guessed())
        chance = self._chance(known)
        for i in range(min(guessed, held + 1)):
            chance += WEIGHT * ((i < held) - chance)
            self._mean += WEIGHT_OF_ALL * ((i < held) - self._mean)
        known.chance = chance

    def forget(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        self._known.pop(sequence, None)


def best_count(chance: float, most: int, costs: GuessCosts, streams: int, batches: int) -> int:
    """The number of guesses, 0 to `most`, that yields the most tokens per second."""
    if not costs.stages or not costs.guess_s:
        return sum(chance**k > LIKELY for k in range(1, most + 1))
    tokens, likely = [1.0], 1.0
    for _ in range(most):
        likely *= chance
        tokens.append(tokens[-1] + likely)
    rates = [tokens[k] / costs.round_s(k, max(1, streams), batches) for k in range(most + 1)]
    best = max(range(most + 1), key=rates.__getitem__)
    return best if rates[best] > WORTH * rates[0] else 0
