"""Paged attention in plain torch: the steps that every backend without kernels of its own shares.

Softmax is in fp32. Rows of one token are two batched matrix products over gathered pages; longer rows go one at a
time, their queries in blocks, so that scores stay within a bound of memory however long the context is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import AttentionMetadata, PrefillRow, PrefillView

SCORES_BYTES = 64 << 20
"""Bound on the fp32 scores of one block of queries."""


def write_pages(key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, metadata: AttentionMetadata) -> None:
    """Put `key` [T, K, D] and `value` [T, K, Dv] into their slots; zero what is left of pages just opened."""
    if metadata.opened_pages is not None:
        k_pages.index_fill_(0, metadata.opened_pages, 0)
        v_pages.index_fill_(0, metadata.opened_pages, 0)
    k_pages.flatten(0, 1).index_copy_(0, metadata.slot_mapping, key)
    v_pages.flatten(0, 1).index_copy_(0, metadata.slot_mapping, value)


def probabilities(scores: Tensor, invalid: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension in fp32; `invalid` positions get 0, `sinks` (broadcastable) take their share."""
    scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(invalid, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    with_sinks = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(with_sinks, dim=-1)[..., :-1]


def attend_decode(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    metadata: AttentionMetadata,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, N, Dv] for `query` [B, N, D]: one token a row, all rows at once."""
    view = metadata.decode_view(sliding_window)
    batch, heads, head_dim = query.shape
    kv_heads, groups = k_pages.shape[2], heads // k_pages.shape[2]
    length = view.invalid.shape[-1]
    keys = k_pages.index_select(0, view.pages).view(batch, length, kv_heads, head_dim)
    values = v_pages.index_select(0, view.pages).view(batch, length, kv_heads, -1)
    scores = (query * scaling).view(batch, kv_heads, groups, head_dim) @ keys.permute(0, 2, 3, 1)
    weights = probabilities(scores, view.invalid, softcap, None if sinks is None else sinks.view(kv_heads, groups, 1))
    return (weights.to(values.dtype) @ values.transpose(1, 2)).view(batch, heads, -1)


def attend_prefill(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    row: PrefillRow,
    view: PrefillView,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[C, N, Dv] for the C queries [C, N, D] of one row."""
    count, heads, head_dim = query.shape
    kv_heads, groups = k_pages.shape[2], heads // k_pages.shape[2]
    length = view.context_len
    keys = k_pages.index_select(0, view.pages).flatten(0, 1)[:length].permute(1, 2, 0)  # [K, D, L]
    values = v_pages.index_select(0, view.pages).flatten(0, 1)[:length].transpose(0, 1)  # [K, L, Dv]
    grouped = (query * scaling).view(count, kv_heads, groups, head_dim).permute(1, 2, 0, 3)  # [K, G, C, D]
    sink_logits = None if sinks is None else sinks.view(kv_heads, groups, 1, 1)
    slot_positions = torch.arange(view.first_position, view.first_position + length, device=query.device)
    block = max(1, SCORES_BYTES // (4 * heads * length))
    out = torch.empty(kv_heads, groups, count, values.shape[-1], dtype=values.dtype, device=query.device)
    for begin in range(0, count, block):
        end = min(count, begin + block)
        position = torch.arange(row.start + begin, row.start + end, device=query.device)[:, None]
        invalid = slot_positions > position
        if sliding_window is not None:
            invalid |= slot_positions <= position - sliding_window
        scores = (grouped[:, :, begin:end].reshape(kv_heads, -1, head_dim) @ keys).view(kv_heads, groups, -1, length)
        weights = probabilities(scores, invalid, softcap, sink_logits).to(values.dtype)
        out[:, :, begin:end] = (weights.view(kv_heads, -1, length) @ values).view(kv_heads, groups, end - begin, -1)
    return out.permute(2, 0, 1, 3).reshape(count, heads, -1)


class PagedAttention:
    """The backend made of the functions above."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        metadata: AttentionMetadata,
        *,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        is_causal: bool = True,
    ) -> Tensor:
        """See `AttentionBackend.attend`. Every query sees its own past only: `is_causal` must be true."""
        if not is_causal:
            raise ValueError("paged attention is causal")
        write_pages(key, value, k_pages, v_pages, metadata)
        tokens, heads, _ = query.shape
        out = torch.empty(tokens, heads, v_pages.shape[-1], dtype=query.dtype, device=query.device)
        if metadata.decode_rows:
            out[metadata.decode_tokens] = attend_decode(
                query[metadata.decode_tokens],
                k_pages,
                v_pages,
                metadata,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
        if not metadata.prefill_rows:
            return out
        for row, view in zip(metadata.prefill_rows, metadata.prefill_views(sliding_window), strict=True):
            here = slice(row.token_start, row.token_start + row.count)
            out[here] = attend_prefill(
                query[here],
                k_pages,
                v_pages,
                row,
                view,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
            )
        return out
