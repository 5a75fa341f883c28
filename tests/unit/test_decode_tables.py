"""Decode attention over tables on the device against the attention that knows its rows on the host."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from stagemesh.errors import ConfigError
from stagemesh.stage_worker.attention import tables
from stagemesh.stage_worker.attention.backend import PagedAttention, attend_prefill_sdpa, make_kernels
from stagemesh.stage_worker.attention.base import AttentionKind, AttentionMetadata
from stagemesh.stage_worker.attention.decode import LayerKind, TorchDecode, difference
from stagemesh.stage_worker.attention.flashinfer_decode import plan_arrays
from stagemesh.stage_worker.attention.paged import attend_prefill
from stagemesh.stage_worker.attention.tables import DecodeTables, pack_rows

HEADS, KV_HEADS, K_DIM, V_DIM, PAGE, PAGES = 4, 2, 8, 6, 4, 40
STARTS = [0, 4, 11, 38, 15]
"""Positions of the rows' tokens: a first token, one that opens a page, others in the midst and at the end of one."""
ROWS, WIDTH = 8, 12
Case = tuple[AttentionMetadata, DecodeTables, list[Tensor]]


def load(tables: DecodeTables, starts: list[int], owned: list[list[int]]) -> None:
    packed = pack_rows(starts, owned, PAGE, tables.rows, tables.width)
    tables.load(packed, packed)


def make_case(fill: float) -> Case:
    """Metadata of both kinds, and query, key, value [ROWS, ...], K and V pages with the rows' history."""
    generator = torch.Generator().manual_seed(7)
    free = torch.randperm(PAGES - 1, generator=generator).add(1).tolist()
    owned = [[free.pop() for _ in range(start // PAGE + 1)] for start in STARTS]
    k_pages, v_pages = (torch.full((PAGES, KV_HEADS, PAGE, dim), fill) for dim in (K_DIM, V_DIM))
    for start, pages in zip(STARTS, owned, strict=True):
        opened = pages[: -(-start // PAGE)]
        k_pages[opened] = torch.randn(len(opened), KV_HEADS, PAGE, K_DIM, generator=generator)
        v_pages[opened] = torch.randn(len(opened), KV_HEADS, PAGE, V_DIM, generator=generator)
    shapes = [(ROWS, HEADS, K_DIM), (ROWS, KV_HEADS, K_DIM), (ROWS, KV_HEADS, V_DIM)]
    new = [torch.randn(shape, generator=generator) for shape in shapes]
    by_rows = AttentionMetadata(STARTS, [1] * len(STARTS), owned, PAGE, "cpu")
    by_table = DecodeTables(ROWS, WIDTH, PAGE, "cpu")
    load(by_table, STARTS, owned)
    return by_rows, by_table, [*new, k_pages, v_pages]


@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (2.0, True)])
def test_rows_of_a_table_get_what_rows_of_the_host_get(
    fill: float, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    by_rows, by_table, tensors = make_case(fill)
    query, key, value, k_pages, v_pages = tensors
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    kind = AttentionKind(0.3, window, softcap, sinks)
    own_k, own_v, count = k_pages.clone(), v_pages.clone(), len(STARTS)
    expected = PagedAttention("cpu").attend(query[:count], key[:count], value[:count], k_pages, v_pages, by_rows, kind)
    found = PagedAttention("cpu", ["torch"]).attend(query, key, value, own_k, own_v, by_table, kind)
    torch.testing.assert_close(found[:count], expected, rtol=1e-4, atol=1e-5)
    assert found.isfinite().all(), "padding rows must not spread NaN"
    for own, page in ((own_k, k_pages), (own_v, v_pages)):
        torch.testing.assert_close(own, page, rtol=0, atol=0, equal_nan=True)


def test_positions_follow_from_the_table_when_it_is_loaded_again() -> None:
    kept = DecodeTables(4, 3, PAGE, "cpu")
    place = kept.packed.data_ptr()
    assert kept.positions.tolist() == [0, 0, 0, 0]
    load(kept, [9, 0], [[5, 6, 7], [8]])
    assert kept.positions.tolist() == [9, 0, 0, 0]
    assert kept.packed.tolist() == [[10, 5, 6, 7], [1, 8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert kept.packed.data_ptr() == place


def test_pages_beyond_the_token_stay_out_of_the_table() -> None:
    """A sequence's list grows with later plans, before the step that was prepared from it runs."""
    assert pack_rows([3], [[1, 2, 3, 4, 5, 6]], PAGE, 1, 2).tolist() == [[4, 1, 0]]


def test_flashinfer_is_told_of_padding_rows_as_one_slot_of_page_0() -> None:
    kept = DecodeTables(4, 3, PAGE, "cpu")
    load(kept, [9, 3], [[5, 6, 7, 1], [8]])
    begins, pages, last = plan_arrays(kept)
    assert (begins.tolist(), pages.tolist(), last.tolist()) == ([0, 3, 4, 5, 6], [5, 6, 7, 8, 0, 0], [2, 4, 1, 1])


KIND = LayerKind(HEADS, KV_HEADS, K_DIM, V_DIM, PAGE, torch.float32, 0.3, None, None, False)


class Wrong(TorchDecode):
    """A kernel that is wrong in one way."""

    name = "wrong"

    def __init__(self, how: str) -> None:
        self.how = how

    def write(self, key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, tables: DecodeTables) -> None:
        super().write(key, value, k_pages, v_pages, tables)
        if self.how == "pages":
            v_pages[0] += 1

    def attend(
        self,
        query: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: DecodeTables,
        kind: LayerKind,
        sinks: Tensor | None,
    ) -> Tensor:
        out = super().attend(query, k_pages, v_pages, tables, kind, sinks)
        if self.how == "raises":
            raise RuntimeError("no image for this device")
        return out * float("nan") if self.how == "nan" else out + (0.01 if self.how == "off" else 0.0)


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "no image"), ("nan", "differs"), ("off", "differs by 0.01"), ("pages", "other pages")]
)
def test_a_kernel_that_is_wrong_here_is_not_used(how: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    wrong = Wrong(how)
    assert said in (difference(wrong, KIND, torch.device("cpu")) or "")
    assert difference(Wrong("not"), KIND, torch.device("cpu")) is None
    _, by_table, tensors = make_case(0.0)
    with caplog.at_level(logging.WARNING):
        found = PagedAttention("cpu", [wrong]).attend(*tensors, by_table, AttentionKind(0.3))
    assert found.isfinite().all()
    assert "does not go through wrong" in caplog.text
    assert said in caplog.text


def test_kernels_that_are_not_installed_are_left_out_and_unknown_ones_refused() -> None:
    made = make_kernels(["flashinfer", "torch"], torch.device("cpu"))
    assert [kernel.name for kernel in made] == ["torch"]
    with pytest.raises(ConfigError, match="'cutlass'"):
        make_kernels(["cutlass"], torch.device("cpu"))


@pytest.mark.parametrize(("start", "count"), [(0, 9), (7, 5), (12, 2)])
def test_prompts_through_sdpa_see_all_before_them_and_nothing_after(start: int, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(PAGES, generator=generator)[:6].tolist()
    metadata = AttentionMetadata([start], [count], [table], PAGE, "cpu")
    (view,) = metadata.prefill_views(None)
    k_pages, v_pages = (torch.randn(PAGES, KV_HEADS, PAGE, K_DIM, generator=generator) for _ in range(2))
    query = torch.randn(count, HEADS, K_DIM, generator=generator)
    expected = attend_prefill(query, k_pages, v_pages, view, AttentionKind(0.3, None, None, None))
    found = attend_prefill_sdpa(query, k_pages, v_pages, view, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_table_holds_what_the_kernels_need_and_no_more() -> None:
    """The copy of a step's rows is one tensor: 64 rows of 1,024 positions are 17 KB."""
    assert pack_rows([1023] * 64, [list(range(64))] * 64, 16, 64, 64).nbytes == 64 * 65 * 4
    assert tables.DecodeTables(64, 64, 16, "cpu").packed.nbytes == 64 * 65 * 4
