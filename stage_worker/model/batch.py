"""The input of one step on one shard."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from stagemesh.errors import InternalError


@dataclass
class StepBatch:
    """T tokens of B rows, row after row, in one packed batch: row i has `counts[i]` tokens from position `starts[i]`.

    The first stage has `token_ids` [T] int64, the others `hidden` [T, H]. `logit_rows` [R] int64: the indices of the
    tokens that get logits on the last stage (no token in the middle of a prompt).
    """

    starts: Sequence[int]
    counts: Sequence[int]
    tables: Sequence[Sequence[int]]
    """Pages of each row's sequence in the order of positions, at least up to the row's last token."""
    page_size: int
    token_ids: Tensor | None = None
    hidden: Tensor | None = None
    logit_rows: Tensor | None = None
    alone: bool = False
    """Whether nothing else computes during this step, so that a shard may use its neighbours' cores."""
    prepared: object | None = None
    """Result of the shard's `prepare`. Only the shard reads it."""

    def input_of(self, first_stage: bool) -> Tensor:
        """Returns the stage's input: token ids on the first one, else hidden states. Raises InternalError if absent."""
        given = self.token_ids if first_stage else self.hidden
        if given is None:
            needed = "the first stage needs token ids" if first_stage else "a stage after the first needs hidden states"
            raise InternalError(needed)
        return given

    def wanted_rows(self) -> Tensor:
        """Returns `logit_rows`. Raises InternalError if they are missing."""
        if self.logit_rows is None:
            raise InternalError("the last stage needs to know whose logits are wanted")
        return self.logit_rows

    def one_by_one(self) -> Iterator[StepBatch]:
        """Yields every token as a separate step, in order."""
        at = 0
        for start, count, table in zip(self.starts, self.counts, self.tables, strict=True):
            for position in range(start, start + count):
                yield StepBatch(
                    starts=[position],
                    counts=[1],
                    tables=[table],
                    page_size=self.page_size,
                    token_ids=None if self.token_ids is None else self.token_ids[at : at + 1],
                    hidden=None if self.hidden is None else self.hidden[at : at + 1],
                    logit_rows=None if self.logit_rows is None else self.logit_rows[self.logit_rows == at] - at,
                )
                at += 1


def lay_out(batch: StepBatch) -> tuple[array[int], array[int], array[int], array[int]]:
    """Returns int32 arrays for kernels: starts, counts, where each row's pages begin, and all rows' pages.

    Raises:
        InternalError: a row is empty, or has too few pages.
    """
    starts, counts = array("i", batch.starts), array("i", batch.counts)
    tables, lengths = array("i"), [0]
    for start, count, table in zip(starts, counts, batch.tables, strict=True):
        pages = -(-(start + count) // batch.page_size)
        if count < 1 or start < 0 or len(table) < pages:
            raise InternalError(f"a row of {count} tokens from position {start} has {len(table)} pages")
        tables.extend(table[:pages])
        lengths.append(pages)
    return starts, counts, array("i", accumulate(lengths[:-1])), tables
