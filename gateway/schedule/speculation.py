"""Guessed tokens of all sequences of a scheduler: who guesses, what is verified, and how it turned out. Pure."""

from __future__ import annotations

from .sequence import Sequence, State


class Guesser:
    """Where guesses come from: a sequence's own past (lookup.py), or a model on the last stage (draft_model.py). This
    one guesses nothing."""

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow those known; none where guessing does not pay."""
        return []

    def waits(self, sequence: Sequence) -> bool:
        """Whether a sequence whose next token is out had better wait for it, as a guess will follow."""
        return False

    def gathers(self, sequence: Sequence) -> bool:
        """Whether others had better wait with it, to go on as one batch."""
        return False

    def ask(self, sequence: Sequence, streams: int) -> int:
        """How many tokens the last stage shall guess behind the one that is planned, among so many streams."""
        return 0

    def told(self, sequence: Sequence, guesses: list[int]) -> None:
        """The last stage's guesses behind the tokens known, as it was asked."""

    def verified(self, sequence: Sequence, guessed: int, held: int) -> None:
        """Of so many guessed tokens, the first so many were drawn."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended, or what was asked for it will never be answered."""


NO_GUESSES = Guesser()


class Speculation:
    """Guesses for all sequences, bounded by what they want; counts."""

    def __init__(self, guesser: Guesser) -> None:
        self.guesser = guesser
        self._drafts = self._draft_tokens = self._accepted_tokens = 0

    def guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow those known, and are wanted; none where guessing does not pay."""
        # The token behind the last guessed one is drawn as well.
        return self.guesser.guess(sequence)[: max(0, sequence.max_tokens - len(sequence.log) - 1)]

    def ask(self, sequence: Sequence, streams: int, at_most: int) -> int:
        """Tokens that the last stage shall guess behind the one that a row draws; 0: not to be asked."""
        # One more token is drawn behind the row's, whatever is guessed.
        at_most = min(at_most, sequence.max_tokens - len(sequence.log) - sequence.unsampled - 2)
        return min(self.guesser.ask(sequence, streams), at_most) if at_most > 0 else 0

    def verified(self, sequence: Sequence, position: int, draft: list[int]) -> None:
        """Tokens guessed from `position` on are back; what was drawn is in the log."""
        drawn = sequence.tokens(position, len(draft))
        held = 0
        while held < len(drawn) and drawn[held] == draft[held]:
            held += 1
        self._drafts += 1
        self._draft_tokens += len(draft)
        self._accepted_tokens += held
        # One that ended is forgotten already, and tokens behind its end say nothing.
        if sequence.state is not State.FINISHED:
            self.guesser.verified(sequence, len(draft), held)

    def take_counts(self) -> tuple[int, int, int]:
        """Draft rows that are back, tokens guessed in them, and those that were drawn, since the last call."""
        counts = self._drafts, self._draft_tokens, self._accepted_tokens
        self._drafts = self._draft_tokens = self._accepted_tokens = 0
        return counts
