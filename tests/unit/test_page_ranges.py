"""Whose pages are whose on a worker: over epochs, over gateways that go, and when they are split anew."""

from __future__ import annotations

import itertools

import pytest

from stagemesh.errors import Unavailable
from stagemesh.stage_worker.page_ranges import PageRanges


def ranges(num_pages: int) -> PageRanges:
    return PageRanges(num_pages, itertools.count(1).__next__)


def test_a_gateway_that_comes_back_finds_its_pages_as_it_left_them() -> None:
    pages = ranges(8)
    first, second = pages.open("a", 1, 4), pages.open("b", 1, 4)
    assert sorted(first.pages + second.pages) == list(range(8))
    with pytest.raises(Unavailable, match="all 8 pages are held, 0 are free and 4 wanted"):
        pages.open("c", 1, 4)
    pages.close("a", 1)
    pages.close("b", 1)
    assert pages.open("b", 2, 4) == second
    assert pages.open("a", 2, 4) == first


def test_a_gateway_that_moves_has_its_pages_at_both_epochs() -> None:
    pages = ranges(4)
    first = pages.open("a", 1, 4)
    assert pages.open("a", 2, 4) == first
    with pytest.raises(Unavailable, match="a holds a range of pages already"):
        pages.open("a", 2, 4)
    pages.close("a", 1)
    with pytest.raises(Unavailable, match="all 4 pages are held"):
        pages.open("b", 2, 4)


def test_pages_that_another_gateway_had_are_not_what_they_were() -> None:
    pages = ranges(4)
    first = pages.open("a", 1, 4)
    pages.close("a", 1)
    other = pages.open("b", 1, 4)
    assert sorted(other.pages) == sorted(first.pages)
    assert other.generation != first.generation
    pages.close("b", 1)
    assert pages.open("a", 1, 4).generation not in (first.generation, other.generation)


def test_pages_are_split_anew_and_what_is_kept_is_what_it_was() -> None:
    pages = ranges(8)
    whole = pages.open("a", 1, 8)
    half = pages.open("a", 2, 4)
    assert half.pages == whole.pages[:4]
    assert half.generation == whole.generation
    with pytest.raises(Unavailable):
        pages.open("b", 1, 4)  # The session of epoch 1 may still write into all of them.
    pages.close("a", 1)
    other = pages.open("b", 1, 4)
    assert set(other.pages) == set(range(8)) - set(half.pages)
    pages.close("b", 1)
    again = pages.open("a", 3, 8)
    assert again.pages[:4] == half.pages
    assert sorted(again.pages) == list(range(8)), "those of one that has gone"


def test_thirds_of_what_was_halves_fit() -> None:
    pages = ranges(12)
    assert not set(pages.open("a", 1, 6).pages) & set(pages.open("b", 1, 6).pages)
    for name in ("a", "b"):
        pages.open(name, 2, 4)
        pages.close(name, 1)
    assert len(pages.open("c", 1, 4).pages) == 4


def test_one_that_may_have_more_goes_on_with_what_there_is() -> None:
    pages = ranges(8)
    few = pages.open("a", 1, 3)
    pages.open("b", 1, 4)
    more = pages.open("a", 2, 6)
    assert len(more.pages) == 4
    assert more.pages[:3] == few.pages
