"""A draft model on the last stage: guesses what comes behind a drawn token, for the next step to verify.

After Leviathan et al. (2023), with exact verification: the pipeline draws its tokens as it would without (sampler.py),
and keeps guesses that are what was drawn. The draft model is whole on one rank. Its keys and values lie in pages of the
same numbers as the model's own: who gives out pages, shares prefixes and takes them back need not know of it.

It computes prompts as they pass, so that a prefix that is shared brings its pages filled here, too. Drawn tokens it
computes when it is asked for guesses, or when some have piled up: as one row, then one guess after the other. The last
few positions of an answer may stay empty here; who takes over their page guesses a little worse.
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
    """What the draft model knows of one sequence."""

    done: int = 0
    """Positions whose keys and values are in the pages."""
    behind: list[int] = field(default_factory=list)
    """Known tokens behind those."""
    guessed: list[int] = field(default_factory=list)
    """Guesses behind the known tokens that were computed, too: right if they are what is drawn."""

    def note(self, position: int, tokens: Sequence[int]) -> None:
        """Tokens that are certain, from `position` on; those known already are passed over. Where there is a gap before
        them, other sequences have filled the pages in between."""
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
        """Hands tokens out to be computed."""
        tokens, self.behind = self.behind[:at_most], self.behind[at_most:]
        self.done += len(tokens)
        return tokens


@dataclass(frozen=True)
class DraftRow:
    """A sequence to catch up with, and how many tokens to guess behind it."""

    drafted: Drafted
    last_token: int
    """The newest known token: what is guessed stands behind it."""
    table: Sequence[int]
    wanted: int


class Drafter:
    """The draft model of one last stage."""

    def __init__(self, shard: Shard, pool: KvPool) -> None:
        """`shard` is the whole draft model; its pages are made here, as many and of the size of `pool`'s."""
        self.shard = shard
        self.pool = KvPool(shard.kv_layers, pool.num_pages, pool.page_size, shard.dtype, shard.device)
        shard.bind_kv(self.pool)

    def guess(self, rows: Sequence[DraftRow]) -> list[list[int]]:
        """Up to `wanted` tokens behind each row: its likeliest next token, that one's, and so on.

        A row gets fewer where its pages end.
        """
        guesses: list[list[int]] = [[] for _ in rows]
        for row in rows:
            if not row.wanted:
                continue
            row.drafted.guessed = []
            if not row.drafted.behind:
                # Its last token was computed as a guess: once more, for its logits.
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
        """Positions that the row's pages hold behind those computed."""
        return len(row.table) * self.pool.page_size - row.drafted.done - len(row.drafted.guessed)

    def _step(self, rows: Sequence[tuple[Sequence[int], int, list[int]]], wanted: list[bool]) -> list[int]:
        """Computes rows of (page table, start, tokens); the likeliest token behind each that is wanted."""
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
