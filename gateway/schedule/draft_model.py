"""Guesses of a draft model on the last stage: when to ask for them, and for how many.

A round with k guesses brings 1 + c + ... + c^k tokens, when each holds with chance c. It lasts as long as a pass of its
rows and guesses over the stages, and k steps of the draft model on the last one; where several rounds are under way, a
stage's share of that, or what the slowest stage takes. Costs are measured; c is, apart for each sequence, from what was
verified. The k with the most tokens a second is asked for, often 0: then now and then one, to notice when it begins to
pay. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .sequence import Sequence
from .speculation import Guesser

AT_FIRST = 0.7
"""Chance that a guessed token holds, before anything is known."""
WEIGHT = 0.1
"""What the newest guessed token counts against all before it."""
LIKELY = 0.3
"""As long as costs are not known, a guess goes on while the chance that all of it holds is more than this."""
NEWEST = 0.05
"""Weight of the newest step in the mean."""
WEIGHT_OF_ALL = 0.02
"""The same, over all sequences."""
WORTH = 1.1
"""Tokens a second with guesses, beside those without, from where on it is done: without, a step does not wait for the
gateway to learn the token of the one before."""
TRY_EVERY = 64
"""Rows of any sequence between two tries where guessing does not pay."""


@dataclass
class GuessCosts:
    """As measured."""

    stages: list[tuple[float, float]] = field(default_factory=list)
    """(seconds of a step without tokens, seconds a token) of each stage; empty: not known yet."""
    guess_s: float = 0.0
    """Seconds of one guess more behind each row of a step; 0: not known yet."""

    def add(self, guesses: int, seconds: float) -> None:
        """A step in which rows got up to so many guesses."""
        each = seconds / max(1, guesses)
        self.guess_s += NEWEST * (each - self.guess_s) if self.guess_s else each

    def round_s(self, guesses: int, streams: int, batches: int) -> float:
        """Seconds that a step of decode rows is to the pipeline, with so many guesses behind each row."""
        rows, at_once = -(-streams // batches), min(streams, batches)
        stages = [base + each * rows * (1 + guesses) for base, each in self.stages]
        stages[-1] += guesses * self.guess_s
        return max(sum(stages) / at_once, *stages)


@dataclass
class _Guessed:
    """What is known of one sequence."""

    chance: float | None = None
    """That a guessed token holds; None: nothing was verified yet."""
    asked: bool = False
    """Guesses are on their way; they ..."""
    pays: bool = False
    """... pay, or are a try."""
    tokens: tuple[int, list[int]] = (0, [])
    """Its length when it was told, and the tokens guessed behind it."""


NOTHING = _Guessed()


class DraftModelGuesser(Guesser):
    """What the last stage guessed, and what it shall guess."""

    def __init__(self, num_tokens: int, batches: int, costs: GuessCosts) -> None:
        """At most `num_tokens` at a time; rows go in so many batches; `costs` is kept up to date by the caller."""
        self._num_tokens = num_tokens
        self._batches = batches
        self._costs = costs
        self._known: dict[Sequence, _Guessed] = {}
        self._until_try = TRY_EVERY
        """Rows that nothing is asked for, before one is tried."""
        self._mean = AT_FIRST
        """What a sequence begins with: the chance over all that were verified."""

    def __len__(self) -> int:
        """Sequences that something is known of."""
        return len(self._known)

    def _chance(self, known: _Guessed) -> float:
        return self._mean if known.chance is None else known.chance

    def guess(self, sequence: Sequence) -> list[int]:
        """What was guessed behind the tokens known."""
        length, guesses = self._known.get(sequence, NOTHING).tokens
        return guesses if length == sequence.length else []

    def waits(self, sequence: Sequence) -> bool:
        """Guesses are on their way with the token."""
        return self._known.get(sequence, NOTHING).asked

    def gathers(self, sequence: Sequence) -> bool:
        """They pay: a try holds nobody up."""
        known = self._known.get(sequence, NOTHING)
        return known.asked and known.pays

    def ask(self, sequence: Sequence, streams: int) -> int:
        """How many tokens to guess behind the next one."""
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
        """The answer."""
        known = self._known.setdefault(sequence, _Guessed())
        known.asked, known.tokens = False, (sequence.length, guesses)

    def verified(self, sequence: Sequence, guessed: int, held: int) -> None:
        """Tokens up to the first that did not hold say something of the chance; those behind it nothing."""
        known = self._known.setdefault(sequence, _Guessed())
        chance = self._chance(known)
        for i in range(min(guessed, held + 1)):
            chance += WEIGHT * ((i < held) - chance)
            self._mean += WEIGHT_OF_ALL * ((i < held) - self._mean)
        known.chance = chance

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._known.pop(sequence, None)


def best_count(chance: float, most: int, costs: GuessCosts, streams: int, batches: int) -> int:
    """The number of guesses, 0 to `most`, that brings the most tokens a second."""
    if not costs.stages or not costs.guess_s:
        return sum(chance**k > LIKELY for k in range(1, most + 1))
    tokens, likely = [1.0], 1.0
    for _ in range(most):
        likely *= chance
        tokens.append(tokens[-1] + likely)
    rates = [tokens[k] / costs.round_s(k, max(1, streams), batches) for k in range(most + 1)]
    best = max(range(most + 1), key=rates.__getitem__)
    return best if rates[best] > WORTH * rates[0] else 0
