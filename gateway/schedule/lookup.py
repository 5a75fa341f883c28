"""Guessing the next tokens of a sequence from its own past: prompt lookup (Saxena 2023), as vLLM's method "ngram".

It finds the longest run of last tokens that also occurs earlier in prompt or output, and takes its latest place. The
tokens that followed there are the guess. A place that reaches the end repeats itself, as a copy in LZ77 does: after
"ab ab" comes "ab ab".

Whether guessing pays is measured without computing anything: each new token is compared with what would have been
guessed, separately for each length of run. A guess grows as long as it is likely enough to be right.

Pure: no I/O, no clock. Each token costs one entry in a dictionary, and a walk over at most `PLACES` earlier places.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from stagemesh.settings.speculative import SpeculativeConfig

from .sequence import Sequence
from .speculation import Guesser

PLACES = 32
"""Most earlier places of the shortest run to look at, the latest first."""
INDEXED_AT_ONCE = 2048
"""Most tokens that one call adds to the index, so that a long prompt does not delay a step."""
LIKELY = 0.3
"""A guess grows while the chance that all of it is right is more than this: a wrong token is computed for nothing."""
AT_FIRST = 0.7
"""Assumed chance that a guessed token is right, before anything is measured."""
WEIGHT = 0.15
"""Weight of the newest comparison in the mean."""
_TOKEN_BYTES = 4


class LookupGuesser(Guesser):
    """An index for each sequence. No stage is asked for guesses.

    Every new token is compared with what would have been guessed, whether that was verified or not. Sequences do not
    wait for each other: that would cost more than a larger batch gains.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._lookups = defaultdict[Sequence, PromptLookup](lambda: PromptLookup(config))

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the known ones. Empty if guessing does not pay."""
        return self._lookups[sequence].guess(sequence)

    def waits(self, sequence: Sequence) -> bool:
        """Whether its next token and one more can be guessed: it is better to verify that one with the next token."""
        return len(self.guess(sequence)) > 1

    def forget(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        self._lookups.pop(sequence, None)


@dataclass
class PromptLookup:
    """Guesses of one sequence."""

    config: SpeculativeConfig
    _tokens: array[int] = field(default_factory=lambda: array("I"))
    """Prompt and log, as far as they are in the index."""
    _last: dict[bytes, int] = field(default_factory=dict)
    """Run of the shortest length -> position where it last ended, before the last token."""
    _before: array[int] = field(default_factory=lambda: array("i"))
    """For each position, where the run that ends there ended before. -1: nowhere."""
    _chances: list[float] = field(default_factory=list)
    """Chance that a guessed token is right, by the length of the run that it follows."""
    _found: tuple[int, int] | None = None
    """(length of the longest run that ends at the last token, where its continuation begins)."""

    def __post_init__(self) -> None:
        self._chances = [AT_FIRST] * (self.config.prompt_lookup_max + 1)

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the known ones. Empty if they are not likely enough to be right."""
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
        """Adds new tokens to the index. Returns False if some are left for the next call."""
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
        """Appends tokens. Runs that end at the old last token or later can be found from here on."""
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
        """The longest run of last tokens that occurs earlier, at its latest place."""
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
