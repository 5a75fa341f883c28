"""Decode attention over `DecodeTables`: the interface of a kernel, and a plain torch version as its reference.

Shapes: B rows, padding included, at most M pages per row, N query heads, K KV heads, D head size, P pages, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .paged import probabilities
from .tables import DecodeTables, pack_rows


@dataclass(frozen=True)
class LayerKind:
    """The properties of a layer that a decode kernel must know before it runs."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    page_size: int
    dtype: torch.dtype
    scaling: float
    window: int | None
    """Number of positions that a query sees, its own included; None for all."""
    softcap: float | None
    has_sinks: bool


class DecodeKernel(Protocol):
    """A kernel that writes and attends rows of `DecodeTables`, padding included, without the host."""

    name: str
    failures: tuple[type[Exception], ...]
    """Exceptions that it raises if it cannot be compiled or launched."""

    def refuses(self, kind: LayerKind) -> str | None:
        """Returns why it cannot serve layers of this kind, or None if it can."""

    def plan(self, tables: DecodeTables) -> None:
        """Does its work on the host before a captured step is launched over new rows."""

    def write(self, key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, tables: DecodeTables) -> None:
        """See `TorchDecode.write`."""

    def attend(
        self,
        query: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: DecodeTables,
        kind: LayerKind,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `TorchDecode.attend`."""
        ...


class TorchDecode:
    """The kernel in plain torch: correct for every kind of layer, and slow."""

    name = "torch"
    failures: tuple[type[Exception], ...] = (RuntimeError,)

    def refuses(self, kind: LayerKind) -> str | None:
        """Returns None: it serves every kind of layer."""
        return None

    def plan(self, tables: DecodeTables) -> None:
        """Does nothing: all data is read on the device."""

    def write(self, key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, tables: DecodeTables) -> None:
        """Writes each row's `key` [K, D] and `value` [K, Dv] into its page. Zeroes the rest of a page just begun.

        Padding rows repeat the write of row 0, which changes nothing. Slots of their own would cost a page.
        """
        index = tables.now()
        size = tables.page_size
        is_row = index.lengths > 0
        written = torch.where(is_row, index.positions, index.positions[:1])
        page, offset = index.pages.gather(1, (written // size)[:, None])[:, 0], written % size
        places = torch.arange(size, device=page.device)
        here = (places == offset[:, None])[:, None, :, None]
        behind = ((offset == 0)[:, None] & (places > 0))[:, None, :, None]
        for new, pages in ((key, k_pages), (value, v_pages)):
            new = torch.where(is_row[:, None, None], new, new[:1])
            content = torch.where(here, new[:, :, None, :], pages.index_select(0, page)).masked_fill(behind, 0)
            pages.index_copy_(0, page, content)

    def attend(
        self,
        query: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: DecodeTables,
        kind: LayerKind,
        sinks: Tensor | None,
    ) -> Tensor:
        """Returns [B, N, Dv] for `query` [B, N, D] over pages [P, K, S, D].

        Results of padding rows are finite, but mean nothing. It gathers all M pages of every row. It serves for checks,
        and if no kernel runs.
        """
        index = tables.now()
        batch, groups = query.shape[0], kind.heads // kind.kv_heads
        slots = torch.arange(tables.width * tables.page_size, device=query.device)
        length = index.lengths.clamp_min(1)[:, None]
        invalid = slots >= length
        if kind.window is not None:
            invalid |= slots < length - kind.window
        # Unused entries of the table name page 0. Its content belongs to another row and may be NaN.
        keys = k_pages.index_select(0, index.pages.flatten()).view(batch, tables.width, *k_pages.shape[1:])
        values = v_pages.index_select(0, index.pages.flatten()).view(batch, tables.width, *v_pages.shape[1:])
        keys = keys.transpose(1, 2).flatten(2, 3)  # [B, K, L, D]
        values = values.transpose(1, 2).flatten(2, 3).masked_fill(invalid[:, None, :, None], 0)
        grouped = (query * kind.scaling).reshape(batch, kind.kv_heads, groups, kind.k_dim)
        scores = grouped @ keys.transpose(2, 3)
        sink_logits = None if sinks is None else sinks.view(kind.kv_heads, groups, 1)
        weights = probabilities(scores, invalid[:, None, None, :], kind.softcap, sink_logits)
        return (weights.to(values.dtype) @ values).reshape(batch, kind.heads, kind.v_dim)


def difference(kernel: DecodeKernel, kind: LayerKind, device: torch.device) -> str | None:
    """Returns how a kernel differs from plain torch on a small step with padding, or None if they agree.

    Waits for the device. It must not be called while a graph is captured.
    """
    size = kind.page_size
    starts = [0, size, 3 * size - 1, 299]
    pages = [start // size + 1 for start in starts]
    width = max(pages) + 1
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [[order.pop() for _ in range(count)] for count in pages]
    tables = DecodeTables(len(starts) + 2, width, size, device)
    packed = pack_rows(starts, rows, size, tables.rows, width)
    tables.load(packed, packed)
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=kind.dtype)

    k_pages, v_pages = (random(sum(pages), kind.kv_heads, size, dim) for dim in (kind.k_dim, kind.v_dim))
    query = random(tables.rows, kind.heads, kind.k_dim)
    key, value = (random(tables.rows, kind.kv_heads, dim) for dim in (kind.k_dim, kind.v_dim))
    sinks = random(kind.heads) if kind.has_sinks else None
    own_k, own_v = k_pages.clone(), v_pages.clone()
    plain = TorchDecode()
    plain.write(key, value, k_pages, v_pages, tables)
    expected = plain.attend(query, k_pages, v_pages, tables, kind, sinks)[: len(starts)].float()
    try:
        kernel.write(key, value, own_k, own_v, tables)
        found = kernel.attend(query, own_k, own_v, tables, kind, sinks)[: len(starts)].float()
        error = float((found - expected).abs().max())
    except kernel.failures as e:
        return f"{type(e).__name__}: {e}"
    if not (torch.equal(own_k, k_pages) and torch.equal(own_v, v_pages)):
        return "it writes other pages than the plain functions do"
    allowed = 1e-3 if kind.dtype == torch.float32 else 4e-2
    # `error > allowed` would let NaN pass.
    return None if error <= allowed else f"its output differs by {error:.3g} where {allowed:.3g} is allowed"
