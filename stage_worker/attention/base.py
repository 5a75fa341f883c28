"""Attention over pages: what is known of a step before its activation arrives, and the contract of a backend.

Shapes: T tokens in the step, B rows, N query heads, K KV heads, G = N / K, D head size, P pages, S page size,
L context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from stagemesh.errors import InternalError

from .tables import DecodeTables


class PageRows:
    """Page ids, as rows of a layer's pages seen as [P * K, S, D]: one gather then brings keys head by head."""

    def __init__(self, pages: Tensor) -> None:
        self.pages = pages
        """[..., M] int64"""
        self._rows: dict[int, Tensor] = {}

    def of_heads(self, kv_heads: int) -> Tensor:
        """[... * K * M] int64 for a layer of K KV heads: all pages of the first head, then of the second, ..."""
        rows = self._rows.get(kv_heads)
        if rows is None:
            heads = torch.arange(kv_heads, device=self.pages.device)
            rows = self._rows[kv_heads] = (self.pages.unsqueeze(-2) * kv_heads + heads[:, None]).flatten()
        return rows


@dataclass(frozen=True)
class BatchSlots:
    """How many context slots, padding included, a batch of decode rows gathers."""

    few: int = 8192
    """Up to so many, padding costs less than another batch."""
    most: int = 65536
    """At most, unless a single row has more."""


@dataclass(frozen=True)
class DecodeView:
    """Rows of one token, as one padded batch."""

    rows: Tensor | None
    """[B] int64: which of the step's decode rows; None: all of them, in order."""
    pages: PageRows
    """[B, M]; short rows are padded with their own first page."""
    invalid: Tensor
    """[B, 1, 1, L] bool: context slots that a row must not see; L = M * S."""


@dataclass(frozen=True)
class PrefillView:
    """One row of several tokens."""

    pages: PageRows
    """[M]: the pages its queries can see."""
    first_position: int
    """Position of slot 0 of those pages."""
    context_len: int
    """Slots in use, counted from `first_position`."""


@dataclass(frozen=True)
class PrefillRow:
    """Where a row of several tokens lies in the step."""

    row: int
    token_start: int
    start: int
    count: int


@dataclass
class AttentionMetadata:
    """Everything index-like of one step, made once for all layers.

    Rows are packed one after the other in the order given. Rows of one token (decode) are attended as one batch,
    longer ones (prefill) one by one. Which pages matter depends on a layer's sliding window: the views are made once
    for each window, by `prepare` ahead of time or at first use.
    """

    starts: list[int]
    counts: list[int]
    page_size: int
    device: torch.device
    num_tokens: int
    positions: Tensor
    """[T] int64"""
    slot_mapping: Tensor
    """[T] int64: page * page_size + offset"""
    opened_pages: Tensor | None
    """Pages that this step opens and leaves partly unwritten: their rest is zeroed."""
    decode_rows: list[int]
    decode_tokens: Tensor | slice
    """Where the decode rows' tokens are in the step."""
    prefill_rows: list[PrefillRow]
    _tables: list[list[int]]
    _batch_slots: BatchSlots
    tables: DecodeTables | None = None
    """A captured step's rows, read on the device; nothing else here says which they are then."""
    _decode_views: dict[int | None, list[DecodeView]] = field(default_factory=dict)
    _prefill_views: dict[int | None, list[PrefillView]] = field(default_factory=dict)
    _slots: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def build(
        starts: Sequence[int],
        counts: Sequence[int],
        block_tables: Sequence[Tensor | Sequence[int]],
        page_size: int,
        device: torch.device | str,
        batch_slots: BatchSlots = BatchSlots(),
    ) -> AttentionMetadata:
        """Metadata of B rows: row i brings `counts[i]` tokens from position `starts[i]`, its pages in order.

        `block_tables[i]` holds at least the pages of positions 0 .. starts[i] + counts[i] - 1.

        Raises:
            InternalError: a row is empty or its block table is too short.
        """
        device = torch.device(device)
        tables = [table.tolist() if isinstance(table, Tensor) else list(table) for table in block_tables]
        positions: list[int] = []
        slots: list[int] = []
        opened: list[int] = []
        decode_rows: list[int] = []
        decode_tokens: list[int] = []
        prefill_rows: list[PrefillRow] = []
        token = 0
        for row, (start, count, table) in enumerate(zip(starts, counts, tables, strict=True)):
            end = start + count
            if count < 1 or start < 0 or len(table) * page_size < end:
                raise InternalError(
                    f"row {row} has {count} tokens from position {start}, and {len(table)} pages of {page_size}"
                )
            positions.extend(range(start, end))
            slots.extend(table[at // page_size] * page_size + at % page_size for at in range(start, end))
            last_page = (end - 1) // page_size
            if start <= last_page * page_size and end % page_size:
                opened.append(table[last_page])
            if count == 1:
                decode_rows.append(row)
                decode_tokens.append(token)
            else:
                prefill_rows.append(PrefillRow(row, token, start, count))
            token += count
        contiguous = not decode_tokens or decode_tokens[-1] - decode_tokens[0] + 1 == len(decode_tokens)
        where: Tensor | slice
        if contiguous:
            where = slice(decode_tokens[0], decode_tokens[-1] + 1) if decode_tokens else slice(0, 0)
        else:
            where = torch.tensor(decode_tokens, device=device)
        return AttentionMetadata(
            starts=list(starts),
            counts=list(counts),
            page_size=page_size,
            device=device,
            num_tokens=token,
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            opened_pages=torch.tensor(opened, device=device) if opened else None,
            decode_rows=decode_rows,
            decode_tokens=where,
            prefill_rows=prefill_rows,
            _tables=tables,
            _batch_slots=batch_slots,
        )

    @staticmethod
    def of_tables(tables: DecodeTables) -> AttentionMetadata:
        """Metadata of a pass over these tables, padding rows included; what it holds lies on the device."""
        index = tables.refresh()
        return AttentionMetadata(
            starts=[],
            counts=[1] * tables.rows,
            page_size=tables.page_size,
            device=tables.packed.device,
            num_tokens=tables.rows,
            positions=index.positions,
            slot_mapping=index.positions,
            opened_pages=None,
            decode_rows=list(range(tables.rows)),
            decode_tokens=slice(0, tables.rows),
            prefill_rows=[],
            tables=tables,
            _tables=[],
            _batch_slots=BatchSlots(),
        )

    def prepare(self, kinds: Iterable[tuple[int | None, int]]) -> None:
        """Make what layers of these (sliding window, KV heads) need now, while the step's input is still under way."""
        for window, kv_heads in kinds:
            self.slots(kv_heads)
            if self.decode_rows:
                for batch in self.decode_views(window):
                    batch.pages.of_heads(kv_heads)
            if self.prefill_rows:
                for view in self.prefill_views(window):
                    view.pages.of_heads(kv_heads)

    def slots(self, kv_heads: int) -> Tensor:
        """[T * K] int64: where each token's heads go in a layer's pages seen as [P * K * S, D]."""
        slots = self._slots.get(kv_heads)
        if slots is None:
            pages, offsets = self.slot_mapping // self.page_size, self.slot_mapping % self.page_size
            heads = torch.arange(kv_heads, device=self.device)
            rows = (pages[:, None] * kv_heads + heads) * self.page_size + offsets[:, None]
            slots = self._slots[kv_heads] = rows.flatten()
        return slots

    def decode_views(self, window: int | None) -> list[DecodeView]:
        """The one-token rows, in batches of like length, for layers that see `window` positions (None: all)."""
        views = self._decode_views.get(window)
        if views is None:
            views = self._decode_views[window] = self._make_decode_views(window)
        return views

    def prefill_views(self, window: int | None) -> list[PrefillView]:
        """The longer rows, in the order of `prefill_rows`, for layers that see `window` positions (None: all)."""
        views = self._prefill_views.get(window)
        if views is None:
            views = self._prefill_views[window] = [self._make_prefill_view(row, window) for row in self.prefill_rows]
        return views

    def _make_decode_views(self, window: int | None) -> list[DecodeView]:
        spans = []
        for row in self.decode_rows:
            last = self.starts[row]
            lowest = 0 if window is None else max(0, last + 1 - window)
            spans.append(_Span(lowest, last, self._tables[row][lowest // self.page_size : last // self.page_size + 1]))
        groups = _alike([len(span.pages) * self.page_size for span in spans], self._batch_slots)
        return [self._make_decode_view(spans, group, len(groups) == 1) for group in groups]

    def _make_decode_view(self, spans: list[_Span], group: list[int], everyone: bool) -> DecodeView:
        chosen = [spans[index] for index in group]
        width = max(len(span.pages) for span in chosen)
        pages = torch.tensor([span.pages + span.pages[:1] * (width - len(span.pages)) for span in chosen])
        lowest, last = torch.tensor([[span.lowest, span.last] for span in chosen]).T.unsqueeze(-1)
        positions = torch.arange(width * self.page_size) + lowest // self.page_size * self.page_size
        invalid = (positions < lowest) | (positions > last)
        rows = None if everyone else torch.tensor(group, device=self.device)
        return DecodeView(rows, PageRows(pages.to(self.device)), invalid[:, None, None, :].to(self.device))

    def _make_prefill_view(self, row: PrefillRow, window: int | None) -> PrefillView:
        end = row.start + row.count
        first_page = 0 if window is None else max(0, row.start + 1 - window) // self.page_size
        first_position = first_page * self.page_size
        pages = self._tables[row.row][first_page : (end - 1) // self.page_size + 1]
        return PrefillView(PageRows(torch.tensor(pages, device=self.device)), first_position, end - first_position)


@dataclass(frozen=True)
class _Span:
    """The positions that one decode row sees, and their pages."""

    lowest: int
    last: int
    pages: list[int]


def _alike(slots: list[int], bounds: BatchSlots) -> list[list[int]]:
    """Rows, by index, in groups that waste no more than half on padding, or little; `slots` is each row's context.

    Rows stay in order when one group holds them all.
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
    """What sets a layer's attention apart. Every query sees its own past only."""

    scaling: float
    sliding_window: int | None = None
    """Positions that a query sees, itself included; None: all."""
    softcap: float | None = None
    """Scores are squashed to it by tanh."""
    sinks: Tensor | None = None
    """[N] extra logits that take probability and give nothing (GPT-OSS)."""


class AttentionBackend(Protocol):
    """Writes a layer's new K and V to their pages, then attends."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        metadata: AttentionMetadata,
        kind: AttentionKind,
    ) -> Tensor:
        """[T, N, Dv] from `query` [T, N, D], `key` [T, K, D], `value` [T, K, Dv] and the layer's pages [P, K, S, D]."""
        ...
