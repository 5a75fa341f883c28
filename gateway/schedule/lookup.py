"""Guessing the next tokens of a sequence from its own past: prompt lookup (Saxena 2023), as vLLM's method "ngram".

The longest run of last tokens that stood before in prompt or output is found, the latest place of it, and what followed
there is the guess. A place that touches the end repeats itself, as a copy in LZ77 does: after "ab ab" comes "ab ab".

Whether guessing pays is measured on the side, at no cost to anybody: for every token that comes, what would have been
guessed is compared with it, apart for each length of run. A guess goes on as long as it is likely enough to hold.

Pure: no I/O, no clock. Costs a token: one entry in a dictionary, and a walk over at most `PLACES` earlier places.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from stagemesh.settings.speculative import SpeculativeConfig

from .sequence import Sequence
from .speculation import Guesser

PLACES = 32
"""Earlier places of the shortest run that are looked at, the latest first."""
INDEXED_AT_ONCE = 2048
"""Tokens that one call takes into the index, so that a long prompt does not hold up a step."""
LIKELY = 0.3
"""A guess goes on while the chance that all of it holds is more than this: a token that fails was computed in vain."""
AT_FIRST = 0.7
"""Chance that a guessed token holds, before anything is known."""
WEIGHT = 0.15
"""What the newest comparison counts against all before it."""
_TOKEN_BYTES = 4


class LookupGuesser(Guesser):
    """An index for each sequence. Nobody needs to be asked, and every token that comes is compared with what would have
    been guessed, verified or not. Waiting for others would cost more than a larger batch brings."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._lookups = defaultdict[Sequence, PromptLookup](lambda: PromptLookup(config))

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow those known; none where guessing does not pay."""
        return self._lookups[sequence].guess(sequence)

    def waits(self, sequence: Sequence) -> bool:
        """Its next token can be guessed, and one behind it: better verified with that token than computed after it."""
        return len(self.guess(sequence)) > 1

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._lookups.pop(sequence, None)


@dataclass
class PromptLookup:
    """Guesses of one sequence."""

    config: SpeculativeConfig
    _tokens: array[int] = field(default_factory=lambda: array("I"))
    """Prompt and log, as far as they are in the index."""
    _last: dict[bytes, int] = field(default_factory=dict)
    """The shortest runs -> where the latest one ends, before the last token."""
    _before: array[int] = field(default_factory=lambda: array("i"))
    """For every position: where the run that ends there ended before that; -1: nowhere."""
    _chances: list[float] = field(default_factory=list)
    """Of a guessed token to hold, by the length of the run it follows."""
    _found: tuple[int, int] | None = None
    """(length of the run, where its continuation begins) behind the last token."""

    def __post_init__(self) -> None:
        self._chances = [AT_FIRST] * (self.config.prompt_lookup_max + 1)

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow what is known; none where they are not likely to hold."""
        if not self._catch_up(sequence) or self._found is None:
            return []
        run, at = self._found
        chance, likely = self._chances[run], 1.0
        out: list[int] = []
        while len(out) < self.config.num_speculative_tokens and (likely := likely * chance) > LIKELY:
            here = at + len(out) - len(self._tokens)
            out.append(out[here] if here >= 0 else self._tokens[here])
        return out

    def _catch_up(self, sequence: Sequence) -> bool:
        """Takes new tokens into the index; False while some are left for another time."""
        done = len(self._tokens)
        new = sequence.tokens(done, min(sequence.length - done, INDEXED_AT_ONCE))
        scored = max(0, len(sequence.prompt) - done)
        if scored:
            self._index(new[:scored])
            self._found = self._find()
        for token in new[scored:]:
            if self._found is not None:
                run, at = self._found
                held = self._tokens[at] == token
                self._chances[run] += WEIGHT * (held - self._chances[run])
            self._index([token])
            self._found = self._find()
        return len(self._tokens) == sequence.length

    def _index(self, tokens: list[int]) -> None:
        """Appends tokens; the runs that ended at the old last token and behind it can be found from here on."""
        size, old = self.config.prompt_lookup_min, len(self._tokens)
        self._tokens.extend(tokens)
        first = max(old - 1, size - 1)
        packed = self._tokens[first - size + 1 :].tobytes()
        last, before = self._last, self._before
        before.extend([-1] * (len(self._tokens) - 1 - len(before)))
        for end in range(first, len(self._tokens) - 1):
            at = _TOKEN_BYTES * (end - first)
            run = packed[at : at + _TOKEN_BYTES * size]
            before[end] = last.get(run, -1)
            last[run] = end

    def _find(self) -> tuple[int, int] | None:
        """The longest run of last tokens that stood before; of several places the latest."""
        tokens, size, most = self._tokens, self.config.prompt_lookup_min, self.config.prompt_lookup_max
        if len(tokens) <= size:
            return None
        end, best, found = self._last.get(tokens[-size:].tobytes(), -1), 0, -1
        for _ in range(PLACES):
            if end < 0 or best == most:
                break
            run = size
            while run < most and run <= end and tokens[end - run] == tokens[-1 - run]:
                run += 1
            if run > best:
                best, found = run, end
            end = self._before[end]
        return (best, found + 1) if found >= 0 else None
