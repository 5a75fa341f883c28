"""Guessed tokens of all sequences of a scheduler: their source, their verification, and counts. Pure."""

from __future__ import annotations

from .sequence import Sequence, State


class Guesser:
    """The source of guesses. This one guesses nothing.

    Others guess from a sequence's own past (lookup.py), or by a model on the last stage (draft_model.py).
    """

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the known ones. Empty if guessing does not pay."""
        return []

    def waits(self, sequence: Sequence) -> bool:
        """Whether a sequence whose next token is in flight should wait for it, because guesses will come with it."""
        return False

    def gathers(self, sequence: Sequence) -> bool:
        """Whether other sequences should wait for this one, so that all go on as one batch."""
        return False

    def ask(self, sequence: Sequence, streams: int) -> int:
        """Number of tokens that the last stage should guess after the planned one. `streams`: running sequences."""
        return 0

    def told(self, sequence: Sequence, guesses: list[int]) -> None:
        """Takes the last stage's guesses for the tokens after the known ones."""

    def verified(self, sequence: Sequence, guessed: int, held: int) -> None:
        """The first `held` of `guessed` guessed tokens were right."""

    def forget(self, sequence: Sequence) -> None:
        """Forgets a sequence: it has ended, or its guesses will never come."""


NO_GUESSES = Guesser()


class Speculation:
    """Guesses for all sequences, within their max_tokens, and counts."""

    def __init__(self, guesser: Guesser) -> None:
        self.guesser = guesser
        self._drafts = self._draft_tokens = self._accepted_tokens = 0

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the known ones, within max_tokens. Empty if guessing does not pay."""
        # The token after the last guessed one is sampled as well.
        return self.guesser.guess(sequence)[: max(0, sequence.max_tokens - len(sequence.log) - 1)]

    def ask(self, sequence: Sequence, streams: int, at_most: int) -> int:
        """Number of tokens that the last stage should guess after the one that a row samples. 0: do not ask."""
        # One more token is sampled after the row's, whatever is guessed.
        at_most = min(at_most, sequence.max_tokens - len(sequence.log) - sequence.unsampled - 2)
        return min(self.guesser.ask(sequence, streams), at_most) if at_most > 0 else 0

    def verified(self, sequence: Sequence, position: int, draft: list[int]) -> None:
        """Counts the right tokens of a draft that began at `position`. The sampled tokens are in the log by now."""
        drawn = sequence.tokens(position, len(draft))
        held = 0
        while held < len(drawn) and drawn[held] == draft[held]:
            held += 1
        self._drafts += 1
        self._draft_tokens += len(draft)
        self._accepted_tokens += held
        # A sequence that has ended is already forgotten, and tokens after its end say nothing.
        if sequence.state is not State.FINISHED:
            self.guesser.verified(sequence, len(draft), held)

    def take_counts(self) -> tuple[int, int, int]:
        """Since the last call: number of draft rows that are back, of guessed tokens in them, and of right ones."""
        counts = self._drafts, self._draft_tokens, self._accepted_tokens
        self._drafts = self._draft_tokens = self._accepted_tokens = 0
        return counts
