"""Whose pages are whose on a worker: over epochs, over gateways that go, and when they are split anew."""

from __future__ import annotations

import itertools

import pytest

from stagemesh.errors import InvalidRequest, Unavailable
from stagemesh.stage_worker.kv.page_ranges import PageRanges


def ranges(num_pages: int) -> PageRanges:
    return PageRanges(num_pages, itertools.count(1).__next__)


def test_a_gateway_that_comes_back_finds_its_pages_as_it_left_them() -> None:
    pages = ranges(8)
    first, second = pages.open("a", 1, 4), pages.open("b", 1, 4)
    assert sorted(first.pages + second.pages) == list(range(8))
    with pytest.raises(Unavailable, match="of 8 pages 0 are free and 4 wanted"):
        pages.open("c", 1, 4)
    pages.close("a", 1)
    pages.close("b", 1)
    for again, before in ((pages.open("b", 2, 4), second), (pages.open("a", 2, 4), first)):
        assert (again.pages, again.generation) == (before.pages, before.generation)


def test_a_gateway_that_moves_has_its_pages_at_both_epochs() -> None:
    pages = ranges(4)
    first = pages.open("a", 1, 4)
    assert pages.open("a", 2, 4).pages == first.pages
    with pytest.raises(Unavailable, match="a holds a range of pages already"):
        pages.open("a", 2, 4)
    pages.close("a", 1)
    with pytest.raises(Unavailable, match="of 4 pages 0 are free"):
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
    half = pages.open("a", 2, 4, (0, 3, 5, 6))
    assert half.pages == tuple(whole.pages[i] if i in (0, 3, 5, 6) else -1 for i in range(7))
    assert (half.count, half.generation) == (4, whole.generation)
    with pytest.raises(Unavailable):
        pages.open("b", 1, 4)  # The session of epoch 1 may still write into all of them.
    pages.close("a", 1)
    other = pages.open("b", 1, 4)
    assert set(other.pages) | set(half.pages) == {-1, *range(8)}
    assert not set(other.pages) & set(half.pages)
    pages.close("b", 1)
    again = pages.open("a", 3, 8)
    assert [again.pages[i] for i in (0, 3, 5, 6)] == [half.pages[i] for i in (0, 3, 5, 6)]
    assert sorted(again.pages) == list(range(8)), "those of one that has gone"


def test_thirds_of_what_was_halves_fit() -> None:
    pages = ranges(12)
    assert not set(pages.open("a", 1, 6).pages) & set(pages.open("b", 1, 6).pages)
    for name in ("a", "b"):
        pages.open(name, 2, 4)
        pages.close(name, 1)
    assert len(pages.open("c", 1, 4).pages) == 4


def test_who_is_to_have_more_waits_until_others_have_less() -> None:
    pages = ranges(8)
    few = pages.open("a", 1, 3)
    pages.open("b", 1, 4)
    with pytest.raises(Unavailable, match="1 are free and 3 wanted"):
        pages.open("a", 2, 6)
    pages.open("b", 2, 2)
    pages.close("b", 1)
    assert pages.open("a", 2, 6).pages[:3] == few.pages


def test_what_a_journal_has_of_pages_is_known_as_long_as_they_are_written_with_it() -> None:
    pages = ranges(8)
    first = pages.open("a", 1, 4, journal=1)
    assert sorted(first.fresh) == sorted(first.pages), "others may have had them"
    assert pages.open("a", 2, 4, journal=1).fresh == ()
    pages.close("a", 1)
    elsewhere = pages.open("a", 3, 4, journal=2)
    assert sorted(elsewhere.fresh) == sorted(elsewhere.pages)
    pages.close("a", 2)
    back = pages.open("a", 4, 4, journal=1)
    assert sorted(back.fresh) == sorted(back.pages), "they were written with the other one meanwhile"
    pages.close("a", 3)
    more = pages.open("a", 5, 6, journal=1)
    assert sorted(more.fresh) == sorted(set(more.pages) - set(back.pages))


def test_nobody_gets_more_than_his_share() -> None:
    with pytest.raises(InvalidRequest, match="a asks for 3 pages and may have 2"):
        ranges(8).open("a", 1, 2, (0, 4, 5))


def test_pages_that_were_given_up_while_nothing_was_open_are_free() -> None:
    pages = ranges(8)
    pages.open("a", 1, 8)
    pages.close("a", 1)
    pages.open("a", 2, 4, (1, 2, 4, 7))
    assert pages.open("b", 1, 4).count == 4


def test_what_another_process_of_the_same_name_wrote_is_not_its_own() -> None:
    pages = ranges(4)
    first = pages.open("a", 1, 4, life=7)
    pages.close("a", 1)
    twin = pages.open("a", 1, 4, life=8)
    assert sorted(twin.pages) == sorted(first.pages)
    assert twin.generation != first.generation
    assert sorted(twin.fresh) == sorted(twin.pages), "nor is what the journal holds"
    pages.close("a", 1)
    again = pages.open("a", 2, 4, life=7)
    assert again.generation not in (first.generation, twin.generation)
    pages.close("a", 2)
    assert pages.open("a", 3, 4, life=7).generation == again.generation
