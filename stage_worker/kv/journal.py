"""The boundary journal: the activations that a stage has sent, kept in host memory page by page like the KV cache.

When the next stage is lost and another worker takes its layers, this stage sends the activations again, and only the
lost layers are computed. The key of an entry is the page that holds the same positions. So a page that several
sequences share has one entry, and a reused prefix leaves no gap.

A page that is used again overwrites its entry. Opening a session drops entries that other gateways wrote, or that
belong to another boundary. A page that arrives from another worker loses its entry. When the memory is full, the entry
that was begun first is evicted.

Shapes: T tokens of a step, S positions a page, H hidden.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..model.batch import StepBatch

_numbers = itertools.count(1)


class Journal:
    """Rows [S, H] of at most `max_pages` pages."""

    def __init__(self, max_pages: int, page_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.page_size = page_size
        self.number = next(_numbers)
        """Id of this journal, unique on this rank."""
        # The system allocates this memory at the first write.
        self._rows = torch.empty((max_pages * page_size, hidden_size), dtype=dtype)
        self._item = np.dtype((np.void, hidden_size * dtype.itemsize))
        self._items = self._as_items(self._rows)
        """The same memory as numpy items, one item per row."""
        self._unused = list(range(max_pages - 1, -1, -1))
        self._entries: OrderedDict[int, int] = OrderedDict()
        """Page -> index of its entry, in the order in which entries were begun."""

    @staticmethod
    def page_bytes(page_size: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of one entry."""
        return page_size * hidden_size * dtype.itemsize

    def write(self, batch: StepBatch, output: torch.Tensor) -> None:
        """Records the output [T, H] of a step. A page without an entry gets one only at its first position."""
        found = [
            (page, self._begin(page) if offset == 0 else self._entries.get(page), at, offset, count)
            for at, page, offset, count in _parts(batch)
        ]
        sources: list[int] = []
        targets: list[int] = []
        for page, place, at, offset, count in found:
            # A step that begins more pages than fit evicts its own earlier entries.
            if place is not None and self._entries.get(page) == place:
                sources.extend(range(at, at + count))
                targets.extend(range(place + offset, place + offset + count))
        if targets:
            # numpy needs fewer calls than torch's indexing, and for few rows the calls dominate the cost.
            items = self._as_items(output)
            self._items[targets] = items if len(sources) == len(items) else items[sources]

    def _as_items(self, rows: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """Views contiguous rows [R, H] as R numpy items."""
        host = rows.cpu() if rows.is_cuda else rows
        return host.view(torch.uint8).numpy().view(self._item)[:, 0]

    def _begin(self, page: int) -> int | None:
        place = self._entries.pop(page, None)
        if place is None:
            if self._unused:
                place = self._unused.pop() * self.page_size
            elif self._entries:
                _, place = self._entries.popitem(last=False)
            else:
                return None
        self._entries[page] = place
        return place

    def read(self, batch: StepBatch) -> torch.Tensor | None:
        """Returns the recorded output [T, H] of a step's rows, or None when an entry is missing."""
        places: list[int] = []
        for _, page, offset, count in _parts(batch):
            place = self._entries.get(page)
            if place is None:
                return None
            places.extend(range(place + offset, place + offset + count))
        return self._rows[torch.tensor(places, dtype=torch.int64)]

    def forget(self, pages: Iterable[int]) -> None:
        """Drops the entries of pages whose new content this stage has not sent."""
        for page in pages:
            place = self._entries.pop(page, None)
            if place is not None:
                self._unused.append(place // self.page_size)

    def held(self, pages: Sequence[int]) -> bytes:
        """Returns one bit for each of `pages`, the lowest bit first: whether the page has an entry."""
        bits = bytearray(-(-len(pages) // 8))
        for at, page in enumerate(pages):
            if page in self._entries:
                bits[at >> 3] |= 1 << (at & 7)
        return bytes(bits)


def _parts(batch: StepBatch) -> Iterator[tuple[int, int, int, int]]:
    """Yields (index of the first token in the step, page, offset in it, count) for each part of a row in one page."""
    at, size = 0, batch.page_size
    for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
        position, end = start, start + count
        while position < end:
            offset = position % size
            length = min(size - offset, end - position)
            yield at, table[position // size], offset, length
            at += length
            position += length
