"""The input of one step on one shard."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.base import AttentionMetadata


@dataclass
class StepBatch:
    """T tokens of B rows, row after row, in one packed batch.

    `token_ids` [T] int64 on the first stage; `hidden` [T, H] on the others; `positions` [T] int64; `logit_rows` [R]
    int64: which of the T tokens get logits on the last stage (none of them in the middle of a prompt).
    """

    token_ids: Tensor | None
    hidden: Tensor | None
    positions: Tensor
    attention: AttentionMetadata
    logit_rows: Tensor | None = None
