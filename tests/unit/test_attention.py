"""Paged attention against the definition, written out for one query at a time over a dense history."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stagemesh.errors import ConfigError, InternalError
from stagemesh.stage_worker.attention.backend import PagedAttention
from stagemesh.stage_worker.attention.base import AttentionKind, AttentionMetadata, BatchSlots

HEADS, KV_HEADS, K_DIM, V_DIM, PAGE = 4, 2, 8, 6, 4
SCALING = 0.3


@dataclass
class Sequence:
    """Dense queries, keys and values of one sequence, and the pages it was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: list[int]


def make_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(64, generator=generator).tolist()
    made = []
    for length in lengths:
        pages = [free.pop() for _ in range(-(-length // PAGE))]
        made.append(
            Sequence(
                torch.randn(length, HEADS, K_DIM, generator=generator),
                torch.randn(length, KV_HEADS, K_DIM, generator=generator),
                torch.randn(length, KV_HEADS, V_DIM, generator=generator),
                pages,
            )
        )
    return made


def by_definition(
    sequence: Sequence, position: int, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """[N, Dv] of the query at `position`."""
    low = 0 if window is None else max(0, position + 1 - window)
    out = torch.empty(HEADS, V_DIM)
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        scores = (sequence.key[low : position + 1, kv_head] @ sequence.query[position, head]) * SCALING
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0 if sinks is None else math.exp(float(sinks[head])))
        out[head] = (weights / total) @ sequence.value[low : position + 1, kv_head]
    return out


def run(
    sequences: list[Sequence],
    steps: list[list[tuple[int, int, int]]],
    *,
    fill: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: PagedAttention | None = None,
    batch_slots: BatchSlots = BatchSlots(),
) -> dict[tuple[int, int], Tensor]:
    """Outputs by (sequence, position) of steps made of rows (sequence, start, count), over pages full of `fill`."""
    backend = backend or PagedAttention("cpu")
    k_pages = torch.full((64, KV_HEADS, PAGE, K_DIM), fill)
    v_pages = torch.full((64, KV_HEADS, PAGE, V_DIM), fill)
    found = {}
    for rows in steps:
        metadata = AttentionMetadata(
            [start for _, start, _ in rows],
            [count for _, _, count in rows],
            [sequences[index].table for index, _, _ in rows],
            PAGE,
            "cpu",
            batch_slots,
        )
        metadata.prepare([(window, KV_HEADS)])
        parts = [(sequences[index], slice(start, start + count)) for index, start, count in rows]
        out = backend.attend(
            torch.cat([sequence.query[part] for sequence, part in parts]),
            torch.cat([sequence.key[part] for sequence, part in parts]),
            torch.cat([sequence.value[part] for sequence, part in parts]),
            k_pages,
            v_pages,
            metadata,
            AttentionKind(SCALING, window, softcap, sinks),
        )
        token = 0
        for index, start, count in rows:
            for position in range(start, start + count):
                found[index, position] = out[token]
                token += 1
    return found


MIXED = [
    [(0, 0, 7)],
    [(1, 0, 1), (0, 7, 5), (2, 0, 3)],
    [(1, 1, 1), (2, 3, 1), (0, 12, 1)],
    [(2, 4, 1), (0, 13, 4), (1, 2, 1)],
]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_mixed_steps_match_the_definition(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    sequences = make_sequences([17, 3, 5])
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    found = run(sequences, MIXED, window=window, softcap=softcap, sinks=sinks)
    assert len(found) == 17 + 3 + 5
    for (index, position), out in found.items():
        expected = by_definition(sequences[index], position, window, softcap, sinks)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_earlier_owners_left_in_pages_is_never_seen(window: int | None, garbage: float) -> None:
    sequences = make_sequences([17, 3, 5])
    clean, dirty = run(sequences, MIXED, window=window), run(sequences, MIXED, window=window, fill=garbage)
    for key, out in dirty.items():
        assert torch.equal(out, clean[key]), key


def test_nan_in_one_row_stays_in_that_row() -> None:
    sequences = make_sequences([17, 3, 5])
    clean = run(sequences, MIXED)
    sequences[2].key[0] = float("nan")
    broken = run(sequences, MIXED)
    for (index, position), out in broken.items():
        if index == 2:
            assert out.isnan().all(), (index, position)
        else:
            assert torch.equal(out, clean[index, position]), (index, position)


def test_blocks_of_queries_change_nothing() -> None:
    sequences = make_sequences([100])
    steps = [[(0, 0, 37)], [(0, 37, 63)]]
    whole = run(sequences, steps, window=20)
    small = PagedAttention("cpu", scores_bytes=4 * HEADS * 100 * 3)
    for key, out in run(sequences, steps, window=20, backend=small).items():
        torch.testing.assert_close(out, whole[key])


@pytest.mark.parametrize("window", [None, 6])
def test_batches_of_like_rows_change_nothing(window: int | None) -> None:
    lengths = [3, 60, 1, 17, 33, 2, 58]
    sequences = make_sequences(lengths)
    steps = [[(index, 0, length - 1)] for index, length in enumerate(lengths) if length > 1]
    steps.append([(index, length - 1, 1) for index, length in enumerate(lengths)])
    few = BatchSlots(few=8, most=128)
    for (index, position), out in run(sequences, steps, window=window, batch_slots=few).items():
        expected = by_definition(sequences[index], position, window, None, None)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_short_rows_do_not_pay_for_a_long_one() -> None:
    """Sixteen rows, one of them of 32,000 positions: padded to the longest they would gather half a million."""
    lengths = [200] * 15 + [32000]
    tables = [list(range(-(-length // 16))) for length in lengths]
    metadata = AttentionMetadata([length - 1 for length in lengths], [1] * 16, tables, 16, "cpu")
    gathered = sum(view.pages.pages.numel() * 16 for view in metadata.decode_views(None))
    assert gathered <= 2 * sum(lengths)
    rows = [view.rows for view in metadata.decode_views(None)]
    assert all(some is not None for some in rows)
    assert sorted(torch.cat([some for some in rows if some is not None]).tolist()) == list(range(16))


def test_layers_with_a_window_touch_only_the_pages_they_see() -> None:
    metadata = AttentionMetadata([63, 40], [1, 8], [list(range(16)), list(range(16, 28))], PAGE, "cpu")
    assert metadata.decode_views(None)[0].pages.pages.numel() == 16
    assert metadata.decode_views(5)[0].pages.pages.tolist() == [[14, 15]]
    (view,) = metadata.prefill_views(5)
    assert view.pages.pages.tolist() == [25, 26, 27]
    assert view.first_position == 36


@pytest.mark.parametrize(("start", "count", "pages"), [(0, 0, 1), (-1, 1, 1), (4, 1, 1), (0, 9, 2)])
def test_a_row_without_its_pages_is_refused(start: int, count: int, pages: int) -> None:
    with pytest.raises(InternalError, match=f"{count} tokens from position {start}"):
        AttentionMetadata([start], [count], [list(range(pages))], PAGE, "cpu")


def test_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'mps'"):
        PagedAttention("mps")
