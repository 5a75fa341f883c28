"""A draft model on the last stage: guesses the tokens after a drawn token, for the next step to verify.

After Leviathan et al. (2023), with exact verification: the pipeline draws the same tokens as without drafts
(sampler.py), and keeps the guesses that are equal to them. One rank holds the whole draft model. Its keys and values
are in pages with the same numbers as the model's own. So the code that allocates, shares and frees pages need not know
the draft model.

The draft model computes prompts as they pass, so that its pages of a shared prefix are filled, too. It computes drawn
tokens when it is asked for guesses, or when many have accumulated: first the tokens as one row, then guess by guess.
The last few positions of an answer may stay empty in its pages. A sequence that reuses such a page gets worse guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..kv.pool import KvPool
from ..model.batch import StepBatch
from ..model.choose import Shard
from .sampler import likeliest


@dataclass
class Drafted:
    """The draft model's state of one sequence."""

    done: int = 0
    """Number of positions whose keys and values are in the pages."""
    behind: list[int] = field(default_factory=list)
    """Known tokens after the first `done`, not computed yet."""
    guessed: list[int] = field(default_factory=list)
    """Guesses after the known tokens that were computed, too. They stay if the same tokens are drawn."""

    def note(self, position: int, tokens: Sequence[int]) -> None:
        """Takes certain tokens from `position` on. Skips those that are known already.

        If there is a gap before them, other sequences have filled the pages in between.
        """
        if tokens and position > self.done + len(self.behind):
            self.done, self.behind, self.guessed = position, [], []
        new = list(tokens[max(0, self.done + len(self.behind) - position) :])
        held = 0
        while not self.behind and held < min(len(new), len(self.guessed)) and new[held] == self.guessed[held]:
            held += 1
        if new:
            self.done += held
            self.behind += new[held:]
            self.guessed = [] if self.behind else self.guessed[held:]

    def take_behind(self, at_most: int) -> list[int]:
        """Returns the next tokens to compute, and counts them as done."""
        tokens, self.behind = self.behind[:at_most], self.behind[at_most:]
        self.done += len(tokens)
        return tokens


@dataclass(frozen=True)
class DraftRow:
    """A sequence to compute up to its last token, and the number of tokens to guess after it."""

    drafted: Drafted
    last_token: int
    """The newest known token. The guesses follow it."""
    table: Sequence[int]
    wanted: int


class Drafter:
    """The draft model of one last stage."""

    def __init__(self, shard: Shard, pool: KvPool) -> None:
        """`shard` is the whole draft model. Its pages are allocated here, equal to `pool`'s in number and size."""
        self.shard = shard
        self.pool = KvPool(shard.kv_layers, pool.num_pages, pool.page_size, shard.dtype, shard.device)
        shard.bind_kv(self.pool)

    def guess(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """Guesses up to `wanted` tokens after each row, each time the likeliest next token.

        A row gets fewer guesses if its pages are full.
        """
        guesses: list[list[int]] = [[] for _ in rows]
        for row in rows:
            if not row.wanted:
                continue
            row.drafted.guessed = []
            if not row.drafted.behind:
                # Its last token was computed as a guess. Compute it once more, for its logits.
                row.drafted.done -= 1
                row.drafted.behind = [row.last_token]
        pending = []
        for i, row in enumerate(rows):
            start = row.drafted.done
            if tokens := row.drafted.take_behind(self._room(row)):
                pending.append((i, start, tokens))
        while pending:
            asking = [i for i, _, _ in pending if rows[i].wanted and not rows[i].drafted.behind]
            likeliest_next = self._step(
                [(rows[i].table, start, tokens) for i, start, tokens in pending], [i in asking for i, _, _ in pending]
            )
            pending = []
            for i, token in zip(asking, likeliest_next, strict=True):
                drafted = rows[i].drafted
                guesses[i].append(token)
                if len(guesses[i]) < rows[i].wanted and self._room(rows[i]):
                    pending.append((i, drafted.done + len(drafted.guessed), [token]))
                    drafted.guessed.append(token)
        return guesses

    def _room(self, row: DraftRow) -> int:
        """Number of free positions in the row's pages after the computed ones."""
        return len(row.table) * self.pool.page_size - row.drafted.done - len(row.drafted.guessed)

    def _step(self, rows: Sequence[tuple[Sequence[int], int, list[int]]], wanted: list[bool]) -> list[int]:
        """Computes rows of (page table, start, tokens). Returns the likeliest next token of each wanted row."""
        tables, starts, tokens = zip(*rows, strict=True)
        counts = [len(entry) for entry in tokens]
        ends = torch.tensor(counts).cumsum(0) - 1
        flat = torch.tensor([token for entry in tokens for token in entry], dtype=torch.int64)
        batch = StepBatch(
            starts=list(starts),
            counts=counts,
            tables=list(tables),
            page_size=self.pool.page_size,
            token_ids=flat.to(self.shard.device),
            logit_rows=ends[torch.tensor(wanted)].to(self.shard.device),
        )
        self.shard.prepare(batch)
        logits = self.shard.forward(batch)
        return likeliest(logits)[0].tolist() if any(wanted) else []
