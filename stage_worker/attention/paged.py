"""Paged attention in plain torch, for steps that no kernel serves.

Softmax is in fp32. Rows of one token are two batched matrix products over gathered pages. Longer rows are computed one
by one, their queries in blocks. So the scores' memory is bounded for every context length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import AttentionKind, AttentionMetadata, DecodeView, PrefillView

SCORES_BYTES = 64 << 20
"""Largest size of the fp32 scores of one block of queries."""


def write_pages(key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, metadata: AttentionMetadata) -> None:
    """Writes `key` [T, K, D] and `value` [T, K, Dv] into their slots. Zeroes the rest of pages just begun."""
    if metadata.opened_pages is not None:
        k_pages.index_fill_(0, metadata.opened_pages, 0)
        v_pages.index_fill_(0, metadata.opened_pages, 0)
    slots = metadata.slots(k_pages.shape[1])
    k_pages.flatten(0, 2).index_copy_(0, slots, key.flatten(0, 1))
    v_pages.flatten(0, 2).index_copy_(0, slots, value.flatten(0, 1))


def probabilities(scores: Tensor, invalid: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Computes softmax over the last dimension in fp32. `invalid` positions get 0.

    `sinks` (broadcastable) take a share of the probability. The function may write into `scores`.
    """
    if softcap is not None:
        scores = torch.tanh(scores.float() / softcap) * softcap
    scores = scores.masked_fill_(invalid, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    with_sinks = torch.cat([scores.float(), sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(with_sinks, dim=-1)[..., :-1]


def attend_decode(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    metadata: AttentionMetadata,
    kind: AttentionKind,
) -> Tensor:
    """Returns [B, N, Dv] for `query` [B, N, D], with one token per row."""
    views = metadata.decode_views(kind.sliding_window)
    if views[0].rows is None:
        return _attend_batch(query, k_pages, v_pages, views[0], kind)
    out = torch.empty(*query.shape[:2], v_pages.shape[-1], dtype=query.dtype, device=query.device)
    for view in views:
        out[view.rows] = _attend_batch(query[view.rows], k_pages, v_pages, view, kind)
    return out


def _attend_batch(query: Tensor, k_pages: Tensor, v_pages: Tensor, view: DecodeView, kind: AttentionKind) -> Tensor:
    """Returns [B, N, Dv] for all rows of a view at once."""
    batch, heads, head_dim = query.shape
    kv_heads = k_pages.shape[1]
    groups = heads // kv_heads
    rows = view.pages.of_heads(kv_heads)
    length = view.invalid.shape[-1]
    keys = k_pages.flatten(0, 1).index_select(0, rows).view(batch * kv_heads, length, head_dim)
    values = v_pages.flatten(0, 1).index_select(0, rows).view(batch * kv_heads, length, -1)
    grouped = (query * kind.scaling).reshape(batch * kv_heads, groups, head_dim)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(batch, kv_heads, groups, length)
    sink_logits = None if kind.sinks is None else kind.sinks.view(kv_heads, groups, 1)
    weights = probabilities(scores, view.invalid, kind.softcap, sink_logits)
    return torch.bmm(weights.to(values.dtype).flatten(0, 1), values).view(batch, heads, -1)


def attend_prefill(
    query: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    view: PrefillView,
    kind: AttentionKind,
    scores_bytes: int = SCORES_BYTES,
) -> Tensor:
    """Returns [C, N, Dv] for C queries [C, N, D] of one row. Scores of a block take at most `scores_bytes`."""
    count, heads, head_dim = query.shape
    kv_heads, length = k_pages.shape[1], view.context_len
    groups = heads // kv_heads
    rows = view.pages.of_heads(kv_heads)
    keys = k_pages.flatten(0, 1).index_select(0, rows).view(kv_heads, -1, head_dim)[:, :length].transpose(1, 2)
    values = v_pages.flatten(0, 1).index_select(0, rows).view(kv_heads, -1, v_pages.shape[-1])[:, :length]
    grouped = (query * kind.scaling).reshape(count, kv_heads, groups, head_dim).permute(1, 2, 0, 3)  # [K, G, C, D]
    sink_logits = None if kind.sinks is None else kind.sinks.view(kv_heads, groups, 1, 1)
    slots = torch.arange(length, device=query.device)
    block = max(1, scores_bytes // (4 * heads * length))
    out = torch.empty(kv_heads, groups, count, values.shape[-1], dtype=values.dtype, device=query.device)
    for begin in range(0, count, block):
        end = min(count, begin + block)
        own = slots[length - count + begin : length - count + end, None]
        invalid = slots > own
        if kind.sliding_window is not None:
            invalid |= slots <= own - kind.sliding_window
        scores = torch.bmm(grouped[:, :, begin:end].reshape(kv_heads, -1, head_dim), keys)
        scores = scores.view(kv_heads, groups, end - begin, length)
        weights = probabilities(scores, invalid, kind.softcap, sink_logits).to(values.dtype)
        attended = torch.bmm(weights.view(kv_heads, -1, length), values)
        out[:, :, begin:end] = attended.view(kv_heads, groups, end - begin, -1)
    return out.permute(2, 0, 1, 3).reshape(count, heads, -1)
