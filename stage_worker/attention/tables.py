"""The rows of a decode step as one tensor on the device: what a captured graph can hold.

A captured step is launched again and again over other rows. So nothing of the rows may be in its arguments: lengths
and page ids lie in one tensor of fixed shape, which is overwritten before each launch, and every index is computed
from it on the device. Rows beyond the step's own (padding up to the captured number) have length 0.

Shapes: B rows, padding included, M pages a row at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TableIndex:
    """What follows from the rows, once a step; captured with it."""

    lengths: Tensor
    """[B] int64; 0: a padding row"""
    positions: Tensor
    """[B] int64 of the rows' tokens; 0 for padding rows"""
    pages: Tensor
    """[B, M] int64; of a padding row those of row 0: what lies in other pages may be NaN"""


class DecodeTables:
    """B rows of one token each, their lengths and pages in memory that stays where it is. At first padding alone."""

    def __init__(self, rows: int, width: int, page_size: int, device: torch.device | str) -> None:
        """For `rows` (B) rows of up to `width` (M) pages."""
        self.rows, self.width, self.page_size = rows, width, page_size
        self.packed = torch.zeros(rows, 1 + width, dtype=torch.int32, device=device)
        """[B, 1 + M] int32: a row's length, its own token included, then its pages; unused places are 0."""
        self.host = self.packed.cpu()
        """The same on the host, for kernels that plan there."""
        self._index: TableIndex | None = None

    @property
    def positions(self) -> Tensor:
        """[B] int64 of the rows' tokens; 0 for padding rows"""
        return self.now().positions

    def load(self, host: Tensor, packed: Tensor) -> None:
        """Describe other rows from now on, in the order of the current stream: of `pack_rows`, `packed` on the device
        or under way there."""
        self.packed.copy_(packed, non_blocking=True)
        self.host, self._index = host, None

    def now(self) -> TableIndex:
        """What follows from the rows, for the pass under way."""
        return self._index if self._index is not None else self.refresh()

    def refresh(self) -> TableIndex:
        """Computes it anew: the first thing in a captured step."""
        lengths = self.packed[:, 0].long()
        pages = torch.where((lengths > 0)[:, None], self.packed[:, 1:], self.packed[:1, 1:]).long()
        self._index = TableIndex(lengths, (lengths - 1).clamp_min(0), pages)
        return self._index


def pack_rows(starts: Sequence[int], tables: Sequence[Sequence[int]], page_size: int, rows: int, width: int) -> Tensor:
    """[rows, 1 + width] int32 on the host, pinned where there is a CUDA device: the content of `DecodeTables.packed`
    for rows whose one token is at position `starts[i]`."""
    packed = torch.zeros(rows, 1 + width, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    view = packed.numpy()
    for row, (start, table) in enumerate(zip(starts, tables, strict=True)):
        used = start // page_size + 1
        view[row, 0] = start + 1
        view[row, 1 : 1 + used] = table[:used]
    return packed
