"""The boundary journal, and the ranges of pages that outlive a session."""

from __future__ import annotations

import torch

from stagemesh.stage_worker.kv.journal import Journal
from stagemesh.stage_worker.model.batch import StepBatch

SIZE, HIDDEN = 4, 3


def batch(*rows: tuple[int, int, list[int]]) -> StepBatch:
    """(start, count, pages) of each row."""
    starts, counts, tables = zip(*rows, strict=True)
    return StepBatch(starts=starts, counts=counts, tables=tables, page_size=SIZE)


def values(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, HIDDEN).to(torch.bfloat16)


def test_what_was_sent_is_read_again_in_other_pieces() -> None:
    journal = Journal(8, SIZE, HIDDEN, torch.bfloat16)
    journal.write(batch((0, 6, [5, 7]), (0, 2, [1])), values(0, 8))
    journal.write(batch((6, 1, [5, 7]), (2, 3, [1, 2])), values(20, 4))
    found = journal.read(batch((0, 5, [1, 2]), (0, 7, [5, 7])))
    assert found is not None
    assert found[:, 0].tolist() == [6, 7, 21, 22, 23, 0, 1, 2, 3, 4, 5, 20]
    assert found.dtype is torch.bfloat16
    assert journal.held(range(8)) == bytes([0b10100110])
    assert journal.held(range(5, 8)) == bytes([0b101])


def test_when_it_is_full_the_oldest_entry_goes_and_is_not_begun_in_the_middle() -> None:
    journal = Journal(2, SIZE, HIDDEN, torch.bfloat16)
    journal.write(batch((0, 2, [0])), values(0, 2))
    journal.write(batch((0, 8, [1, 2])), values(10, 8))
    assert journal.read(batch((0, 2, [0]))) is None
    journal.write(batch((2, 2, [0])), values(2, 2))
    assert journal.held(range(8)) == bytes([0b110]), "a page without its beginning is of no use"
    journal.write(batch((0, 1, [1])), values(50, 1))
    journal.write(batch((0, 1, [3])), values(60, 1))
    assert journal.held(range(8)) == bytes([0b1010]), "page 1 was begun anew: page 2 is the oldest"
    found = journal.read(batch((0, 1, [1]), (0, 1, [3])))
    assert found is not None
    assert found[:, 0].tolist() == [50, 60]


def test_a_step_that_begins_more_pages_than_there_is_room_for_keeps_the_last() -> None:
    journal = Journal(2, SIZE, HIDDEN, torch.bfloat16)
    journal.write(batch((0, 16, [4, 5, 6, 7])), values(0, 16))
    assert journal.held(range(8)) == bytes([0b11000000])
    found = journal.read(batch((8, 8, [4, 5, 6, 7])))
    assert found is not None
    assert found[:, 0].tolist() == list(range(8, 16))


def test_without_memory_nothing_is_kept() -> None:
    journal = Journal(0, SIZE, HIDDEN, torch.bfloat16)
    journal.write(batch((0, 3, [0])), values(0, 3))
    assert journal.held(range(8)) == b"\0"


def test_pages_that_come_from_elsewhere_have_no_entry() -> None:
    """What was sent for them before was another pipeline's."""
    journal = Journal(2, SIZE, HIDDEN, torch.bfloat16)
    journal.write(batch((0, 2 * SIZE, [0, 1])), values(0, 2 * SIZE))
    journal.forget([1, 5])
    assert journal.held(range(3)) == bytes([0b1])
    journal.write(batch((0, SIZE, [2])), values(0, SIZE))
    assert journal.held(range(3)) == bytes([0b101]), "its place is free again"
