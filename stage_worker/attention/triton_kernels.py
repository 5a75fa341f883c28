# mypy: ignore-errors
"""Triton kernels for decode over pages [P, K, S, D]: cache write, split attention, and the sum of its splits.

A split is a piece of one row's context. With few rows, one program per row and head would leave most of the device
idle (the idea is from Flash-Decoding). The number of splits is fixed at launch. Their size depends on the row's length,
which is read on the device. This module needs Triton; the host's side is `triton_decode.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.errors import TritonError

__all__ = ["TritonError", "attend_kernel", "merge_kernel", "rope_kernel", "write_kernel"]


@triton.jit
def write_kernel(
    key, value, k_pages, v_pages, packed,
    packed_stride, key_row, key_head, value_row, value_head,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_PAGE: tl.constexpr,
):  # fmt: skip
    """Writes key and value of one row and KV head to their slot. Zeroes the rest of a page just begun."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(packed + row * packed_stride)
    if length > 0:
        position = length - 1
        offset = position % PAGE
        page = tl.load(packed + row * packed_stride + 1 + position // PAGE).to(tl.int64)
        base = (page * KV_HEADS + head) * PAGE
        k_at, v_at, place = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_PAGE)
        behind = (place > 0) & (place < PAGE) & (offset == 0)
        k_zero = tl.zeros([BLOCK_PAGE, BLOCK_K], k_pages.dtype.element_ty)
        v_zero = tl.zeros([BLOCK_PAGE, BLOCK_V], v_pages.dtype.element_ty)
        k_rest = (base + place)[:, None] * K_DIM + k_at[None, :]
        v_rest = (base + place)[:, None] * V_DIM + v_at[None, :]
        tl.store(k_pages + k_rest, k_zero, mask=behind[:, None] & (k_at < K_DIM)[None, :])
        tl.store(v_pages + v_rest, v_zero, mask=behind[:, None] & (v_at < V_DIM)[None, :])
        k_new = tl.load(key + row * key_row + head * key_head + k_at, mask=k_at < K_DIM)
        v_new = tl.load(value + row * value_row + head * value_head + v_at, mask=v_at < V_DIM)
        tl.store(k_pages + (base + offset) * K_DIM + k_at, k_new, mask=k_at < K_DIM)
        tl.store(v_pages + (base + offset) * V_DIM + v_at, v_new, mask=v_at < V_DIM)


@triton.jit
def attend_kernel(
    query, k_pages, v_pages, packed, part_out, part_top, part_sum,
    scaling, softcap, packed_stride, query_row, query_head,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, PAGE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends the G queries of one row and KV head over the slots of one split, without normalisation."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(packed + row * packed_stride)
    low = length * 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    piece = tl.cdiv(tl.cdiv(length - low, SPLITS), BLOCK_N) * BLOCK_N
    begin = low + split * piece
    end = tl.minimum(begin + piece, length)
    g_at, k_at, v_at = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    heads = head * GROUPS + g_at
    q = tl.load(
        query + row * query_row + heads[:, None] * query_head + k_at[None, :],
        mask=(g_at < GROUPS)[:, None] & (k_at < K_DIM)[None, :],
        other=0.0,
    )
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < end
        page = tl.load(packed + row * packed_stride + 1 + n // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * KV_HEADS + head) * PAGE + n % PAGE
        k = tl.load(
            k_pages + slot[None, :] * K_DIM + k_at[:, None], mask=seen[None, :] & (k_at < K_DIM)[:, None], other=0.0
        )
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        kept = tl.exp(top - new_top)
        v = tl.load(
            v_pages + slot[:, None] * V_DIM + v_at[None, :], mask=seen[:, None] & (v_at < V_DIM)[None, :], other=0.0
        )
        acc = acc * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * kept + tl.sum(weights, 1)
        top = new_top
    part = (row * KV_HEADS * GROUPS + heads) * SPLITS + split
    tl.store(part_top + part, top, mask=g_at < GROUPS)
    tl.store(part_sum + part, total, mask=g_at < GROUPS)
    tl.store(
        part_out + part[:, None] * V_DIM + v_at[None, :], acc, mask=(g_at < GROUPS)[:, None] & (v_at < V_DIM)[None, :]
    )


@triton.jit
def merge_kernel(
    part_out, part_top, part_sum, sinks, out,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Sums the splits of one row and query head, weighted by their share of the whole softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    split, v_at = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    part = (row * HEADS + head) * SPLITS + split
    tops = tl.load(part_top + part)
    top = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    # A padding row sees no slot. Without this, its weights would be NaN.
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp(tops - top)
    total = tl.sum(share * tl.load(part_sum + part), 0)
    if SINKS:
        total += tl.exp(sink - top)
    parts = tl.load(part_out + part[:, None] * V_DIM + v_at[None, :], mask=(v_at < V_DIM)[None, :], other=0.0)
    attended = tl.sum(parts * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (row * HEADS + head) * V_DIM + v_at, attended.to(out.dtype.element_ty), mask=v_at < V_DIM)


@triton.jit
def rope_kernel(
    query, key, cos, sin, q_out, k_out, tokens, q_token, q_head, k_token, k_head, cos_token,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotates the two halves of one token and head (query heads, then KV heads). Outputs are [heads, T, D]."""
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    half = DIM // 2
    mask = at < half
    c_low = tl.load(cos + token * cos_token + at, mask=mask).to(tl.float32)
    c_high = tl.load(cos + token * cos_token + half + at, mask=mask).to(tl.float32)
    s_low = tl.load(sin + token * cos_token + at, mask=mask).to(tl.float32)
    s_high = tl.load(sin + token * cos_token + half + at, mask=mask).to(tl.float32)
    if head < HEADS:
        source = query + token * q_token + head * q_head
        target = q_out + (head.to(tl.int64) * tokens + token) * DIM
    else:
        source = key + token * k_token + (head - HEADS) * k_head
        target = k_out + ((head - HEADS).to(tl.int64) * tokens + token) * DIM
    low = tl.load(source + at, mask=mask).to(tl.float32)
    high = tl.load(source + half + at, mask=mask).to(tl.float32)
    tl.store(target + at, (low * c_low - high * s_low).to(q_out.dtype.element_ty), mask=mask)
    tl.store(target + half + at, (high * c_high + low * s_high).to(q_out.dtype.element_ty), mask=mask)
