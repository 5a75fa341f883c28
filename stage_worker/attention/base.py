"""Metadata of attention over pages: what is known of a step before its activation arrives, and layer properties.

Shapes: T tokens in the step, B rows, N query heads, K KV heads, G = N / K, D head size, P pages, S page size,
L context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stagemesh.errors import InternalError


class PageRows:
    """Page ids, and their rows in a layer's pages viewed as [P * K, S, D]: one gather returns keys head by head."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        """Page ids [..., M], int64."""
        self._rows: dict[int, Tensor] = {}

    def of_heads(self, kv_heads: int) -> Tensor:
        """Returns [... * K * M] int64 for a layer of K KV heads: all pages of the first head, then of the next, ..."""
        rows = self._rows.get(kv_heads)
        if rows is None:
            heads = torch.arange(kv_heads, device=self.pages.device)
            rows = self._rows[kv_heads] = (self.pages.unsqueeze(-2) * kv_heads + heads[:, None]).flatten()
        return rows


@dataclass(frozen=True)
class BatchSlots:
    """Limits on the context slots, padding included, that a batch of decode rows gathers."""

    few: int = 8192
    """Up to this many, padding costs less than another batch."""
    most: int = 65536
    """Largest number, unless a single row has more."""


@dataclass(frozen=True)
class DecodeView:
    """Rows of one token each, as one padded batch."""

    rows: Tensor | None
    """Indices [B] int64 into the step's decode rows; None for all of them, in order."""
    pages: PageRows
    """Page ids [B, M]. Short rows are padded with their own first page."""
    invalid: Tensor
    """[B, 1, 1, L] bool: the context slots that a row must not see; L = M * S."""


@dataclass(frozen=True)
class PrefillView:
    """One row of several tokens."""

    tokens: slice
    """Position of the tokens in the step."""
    pages: PageRows
    """Page ids [M] that the queries can see."""
    first_position: int
    """Position of slot 0 of those pages."""
    context_len: int
    """Number of slots in use from `first_position` on. The last one is the last token's."""


class AttentionMetadata:
    """All indices of one step, made once for all layers.

    Rows are packed one after the other in the given order. Rows of one token (decode) are attended as one batch, longer
    ones (prefill) one by one. Which pages matter depends on a layer's sliding window. The views are made once for each
    window, by `prepare` ahead of time or at first use.
    """

    def __init__(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str,
        batch_slots: BatchSlots = BatchSlots(),
    ) -> None:
        """Makes the metadata of B rows: row i has `counts[i]` tokens from position `starts[i]`.

        `tables[i]` has its pages in order, at least those of positions 0 .. starts[i] + counts[i] - 1.

        Raises:
            InternalError: a row is empty or its table is too short.
        """
        self._starts, self._counts = list(starts), list(counts)
        self._tables = [list(table) for table in tables]
        self._page_size, self._device, self._batch_slots = page_size, device, batch_slots
        self._decode_rows: list[int] = []
        self._prefill_rows: list[tuple[int, int]] = []
        """(row, index of its first token in the step)."""
        positions: list[int] = []
        slots: list[int] = []
        opened: list[int] = []
        decode_tokens: list[int] = []
        for row, (start, count, table) in enumerate(zip(starts, counts, self._tables, strict=True)):
            end = start + count
            if count < 1 or start < 0 or len(table) * page_size < end:
                raise InternalError(
                    f"row {row} has {count} tokens from position {start}, and {len(table)} pages of {page_size}"
                )
            if count == 1:
                self._decode_rows.append(row)
                decode_tokens.append(len(positions))
            else:
                self._prefill_rows.append((row, len(positions)))
            positions.extend(range(start, end))
            slots.extend(table[at // page_size] * page_size + at % page_size for at in range(start, end))
            last_page = (end - 1) // page_size
            if start <= last_page * page_size and end % page_size:
                opened.append(table[last_page])
        self.positions = torch.tensor(positions, device=device)
        """Position of each token in its sequence, [T] int64."""
        self._slot_mapping = torch.tensor(slots, device=device)
        """Slot of each token, [T] int64: page * page_size + offset."""
        self.opened_pages = torch.tensor(opened, device=device) if opened else None
        """Pages that this step begins and does not fill. Their rest is zeroed."""
        first = decode_tokens[0] if decode_tokens else 0
        self.decode_tokens: Tensor | slice = slice(first, first + len(decode_tokens))
        """Positions of the decode rows' tokens in the step."""
        if decode_tokens != list(range(first, first + len(decode_tokens))):
            self.decode_tokens = torch.tensor(decode_tokens, device=device)
        self._decode_views: dict[int | None, list[DecodeView]] = {}
        self._prefill_views: dict[int | None, list[PrefillView]] = {}
        self._slots: dict[int, Tensor] = {}

    def prepare(self, kinds: Iterable[tuple[int | None, int]]) -> None:
        """Makes the indices for layers of these (sliding window, KV heads), before the step's input has arrived."""
        for window, kv_heads in kinds:
            self.slots(kv_heads)
            views: list[DecodeView | PrefillView] = [*self.decode_views(window), *self.prefill_views(window)]
            for view in views:
                view.pages.of_heads(kv_heads)

    def slots(self, kv_heads: int) -> Tensor:
        """Returns [T * K] int64: where each token's heads go in a layer's pages viewed as [P * K * S, D]."""
        slots = self._slots.get(kv_heads)
        if slots is None:
            pages, offsets = self._slot_mapping // self._page_size, self._slot_mapping % self._page_size
            heads = torch.arange(kv_heads, device=self._device)
            rows = (pages[:, None] * kv_heads + heads) * self._page_size + offsets[:, None]
            slots = self._slots[kv_heads] = rows.flatten()
        return slots

    def decode_views(self, window: int | None) -> list[DecodeView]:
        """Returns the one-token rows, in batches of similar length, for layers that see `window` positions or all."""
        views = self._decode_views.get(window)
        if views is None:
            views = self._decode_views[window] = self._make_decode_views(window) if self._decode_rows else []
        return views

    def prefill_views(self, window: int | None) -> list[PrefillView]:
        """Returns the longer rows, in order, for layers that see `window` positions (None: all)."""
        views = self._prefill_views.get(window)
        if views is None:
            made = [self._make_prefill_view(row, token, window) for row, token in self._prefill_rows]
            views = self._prefill_views[window] = made
        return views

    def _make_decode_views(self, window: int | None) -> list[DecodeView]:
        seen, pages = [], []
        for row in self._decode_rows:
            last = self._starts[row]
            lowest = 0 if window is None else max(0, last + 1 - window)
            seen.append((lowest, last))
            pages.append(self._tables[row][lowest // self._page_size : last // self._page_size + 1])
        groups = _alike([len(some) * self._page_size for some in pages], self._batch_slots)
        return [self._make_decode_view(seen, pages, group, len(groups) == 1) for group in groups]

    def _make_decode_view(
        self, seen: list[tuple[int, int]], pages: list[list[int]], group: list[int], everyone: bool
    ) -> DecodeView:
        """Makes one view of the rows in `group`. `seen`: the first and the last position that each row sees."""
        width = max(len(pages[row]) for row in group)
        padded = torch.tensor([pages[row] + pages[row][:1] * (width - len(pages[row])) for row in group])
        lowest, last = torch.tensor([seen[row] for row in group]).T.unsqueeze(-1)
        positions = torch.arange(width * self._page_size) + lowest // self._page_size * self._page_size
        invalid = (positions < lowest) | (positions > last)
        rows = None if everyone else torch.tensor(group, device=self._device)
        return DecodeView(rows, PageRows(padded.to(self._device)), invalid[:, None, None, :].to(self._device))

    def _make_prefill_view(self, row: int, token: int, window: int | None) -> PrefillView:
        start, count = self._starts[row], self._counts[row]
        first_page = 0 if window is None else max(0, start + 1 - window) // self._page_size
        first_position = first_page * self._page_size
        pages = self._tables[row][first_page : (start + count - 1) // self._page_size + 1]
        rows = PageRows(torch.tensor(pages, device=self._device))
        return PrefillView(slice(token, token + count), rows, first_position, start + count - first_position)


def _alike(slots: list[int], bounds: BatchSlots) -> list[list[int]]:
    """Groups rows, by index, so that padding is at most half of a group, or small. `slots` is each row's context.

    Rows stay in order if one group holds them all.
    """
    if max(slots) * len(slots) <= max(bounds.few, min(bounds.most, 2 * sum(slots))):
        return [list(range(len(slots)))]
    groups: list[list[int]] = []
    widest = real = 0
    for index in sorted(range(len(slots)), key=lambda index: -slots[index]):
        padded = widest * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > max(bounds.few, min(bounds.most, 2 * (real + slots[index]))):
            groups.append([])
            widest, real = slots[index], 0
        groups[-1].append(index)
        real += slots[index]
    return groups


@dataclass(frozen=True)
class AttentionKind:
    """The properties of a layer's attention. Every query sees only its own past."""

    scaling: float
    sliding_window: int | None = None
    """Number of positions that a query sees, its own included; None for all."""
    softcap: float | None = None
    """Bound to which tanh squashes the scores."""
    sinks: Tensor | None = None
    """[N] extra logits that take probability and give nothing (GPT-OSS)."""
