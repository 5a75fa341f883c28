"""The input of one step on one shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class StepBatch:
    """T tokens of B rows, row after row, in one packed batch: row i brings `counts[i]` tokens from `starts[i]`.

    `token_ids` [T] int64 on the first stage; `hidden` [T, H] on the others; `logit_rows` [R] int64: which of the T
    tokens get logits on the last stage (none of them in the middle of a prompt).
    """

    starts: Sequence[int]
    counts: Sequence[int]
    tables: Sequence[Sequence[int]]
    """Pages of each row's sequence, in the order of positions; at least those up to its last token."""
    page_size: int
    token_ids: Tensor | None = None
    hidden: Tensor | None = None
    logit_rows: Tensor | None = None
    alone: bool = False
    """Nothing else computes meanwhile: a shard may use its neighbours' cores."""
    prepared: object | None = None
    """What the shard's `prepare` made of the rows; the shard's own business."""
