"""The rows of a decode step as one tensor on the device, for captured graphs.

A captured step is launched many times over different rows. So its arguments must not depend on the rows: lengths and
page ids are in one tensor of fixed shape, which is overwritten before each launch. Every index is computed from it on
the device. Rows after the step's own (padding up to the captured number) have length 0.

Shapes: B rows, padding included, at most M pages per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TableIndex:
    """Indices computed from the rows once per step, and captured with the step."""

    lengths: Tensor
    """Length of each row, [B] int64; 0 for padding rows."""
    positions: Tensor
    """Position of each row's token, [B] int64; 0 for padding rows."""
    pages: Tensor
    """Pages of each row, [B, M] int64. Padding rows have the pages of row 0, because other pages may hold NaN."""


class DecodeTables:
    """B rows of one token each, with lengths and pages in memory that does not move. At first all rows are padding."""

    def __init__(self, rows: int, width: int, page_size: int, device: torch.device | str) -> None:
        """Makes tables for `rows` (B) rows of up to `width` (M) pages."""
        self.rows, self.width, self.page_size = rows, width, page_size
        self.packed = torch.zeros(rows, 1 + width, dtype=torch.int32, device=device)
        """[B, 1 + M] int32: a row's length, its own token included, then its pages; unused entries are 0."""
        self.host = self.packed.cpu()
        """A copy of `packed` on the host, for kernels that plan there."""
        self._index: TableIndex | None = None

    @property
    def positions(self) -> Tensor:
        """Position of each row's token, [B] int64; 0 for padding rows."""
        return self.now().positions

    def load(self, host: Tensor, packed: Tensor) -> None:
        """Replaces the rows, in the order of the current stream.

        `host` is a result of `pack_rows`. `packed` is its copy on the device, which may still be under way.
        """
        self.packed.copy_(packed, non_blocking=True)
        self.host, self._index = host, None

    def now(self) -> TableIndex:
        """Returns the indices for the pass under way."""
        return self._index if self._index is not None else self.refresh()

    def refresh(self) -> TableIndex:
        """Computes the indices again. A captured step does this first."""
        lengths = self.packed[:, 0].long()
        pages = torch.where((lengths > 0)[:, None], self.packed[:, 1:], self.packed[:1, 1:]).long()
        self._index = TableIndex(lengths, (lengths - 1).clamp_min(0), pages)
        return self._index


def pack_rows(starts: Sequence[int], tables: Sequence[Sequence[int]], page_size: int, rows: int, width: int) -> Tensor:
    """Makes the content of `DecodeTables.packed`, [rows, 1 + width] int32, for rows whose one token is at `starts[i]`.

    It is on the host, in pinned memory if there is a CUDA device.
    """
    packed = torch.zeros(rows, 1 + width, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    view = packed.numpy()
    for row, (start, table) in enumerate(zip(starts, tables, strict=True)):
        used = start // page_size + 1
        view[row, 0] = start + 1
        view[row, 1 : 1 + used] = table[:used]
    return packed
