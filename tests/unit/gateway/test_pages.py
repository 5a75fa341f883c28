"""Pages that hold prefixes: who holds them, and which go first when others are needed."""

from __future__ import annotations

import pytest
from prefix_world import SIZE

from stagemesh.gateway.schedule.pages import ROOT, PageAllocator


def chunks(*values: int) -> list[bytes]:
    return [bytes([value] * SIZE) for value in values]


def fill(allocator: PageAllocator, *values: int) -> list[int]:
    """Pages that hold the prefix `values`, offered and let go."""
    pages = allocator.allocate(len(values))
    assert pages is not None
    node = ROOT
    for page, content in zip(pages, chunks(*values), strict=True):
        node = allocator.offer(page, node, content)
    allocator.free(pages)
    return pages


def test_empty_pages_go_before_offered_ones_and_the_last_of_a_prefix_before_its_first() -> None:
    allocator = PageAllocator(5, SIZE)
    pages = fill(allocator, 1, 2, 3)
    assert allocator.num_free == 5
    empty = allocator.allocate(2)
    assert empty is not None
    assert not set(empty) & set(pages)
    assert allocator.find(ROOT, chunks(1, 2, 3)) == pages
    assert allocator.allocate(1) == [pages[2]]
    assert allocator.find(ROOT, chunks(1, 2, 3)) == pages[:2]


def test_what_was_used_last_stays_longest() -> None:
    allocator = PageAllocator(4, SIZE)
    old, new = fill(allocator, 1), fill(allocator, 2)
    assert allocator.allocate(0, old) == []
    allocator.free(old)
    allocator.allocate(3)
    assert (allocator.find(ROOT, chunks(1)), allocator.find(ROOT, chunks(2))) == (old, []), new


def test_pages_that_are_to_be_shared_are_not_evicted_for_the_rest() -> None:
    allocator = PageAllocator(4, SIZE)
    shared = fill(allocator, 1, 2)
    assert allocator.allocate(3, shared) is None
    assert allocator.num_free == 4, "refused as a whole"
    fresh = allocator.allocate(2, shared)
    assert fresh is not None
    assert not set(fresh) & set(shared)
    assert allocator.num_free == 0


def test_what_hangs_below_a_withdrawn_page_is_gone() -> None:
    allocator = PageAllocator(4, SIZE)
    pages = fill(allocator, 1, 2)
    allocator.allocate(0, pages[:1])
    allocator.withdraw(pages[:1])
    allocator.free(pages[:1])
    again = fill(allocator, 1)
    assert allocator.find(ROOT, chunks(1, 2)) == again


def test_a_shared_page_freed_once_too_often_is_noticed() -> None:
    allocator = PageAllocator(4, SIZE)
    pages = fill(allocator, 1)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(pages)
