"""Which worker takes which stage."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.coordinator.planning.placement import Candidate, Placement, place
from stagemesh.coordinator.values import Range
from stagemesh.planning.cost import Kind

KIND = Kind(1, 0, 1e11, 1e10)


def worker(name: str, pool: int = -1, kept: Range | None = None, speed: float = 1.0, memory: int = 0) -> Candidate:
    return Candidate(name, pool, Kind(1, memory, 1e11, 1e10 * speed), kept)


def names(placement: Placement) -> dict[int, str]:
    return {stage: placement.workers[stage].worker_id for stage in sorted(placement.workers)}


def test_workers_bound_to_a_stage_take_it_and_no_other() -> None:
    placed = place(2, [worker("b", 1), worker("a", 0)])
    assert names(placed) == {0: "a", 1: "b"}
    placed = place(2, [worker("a", 0), worker("b", 0)])
    assert names(placed) == {0: "a"}
    assert placed.missing == (1,)
    assert [c.worker_id for c in placed.standby] == ["b"]


def test_free_workers_fill_the_gaps() -> None:
    assert names(place(3, [worker("free"), worker("a", 0), worker("c", 2)])) == {0: "a", 1: "free", 2: "c"}


def test_names_count_as_people_do() -> None:
    assert names(place(2, [worker("w10"), worker("w9")])) == {0: "w9", 1: "w10"}


def test_who_holds_a_stage_keeps_it() -> None:
    pool = [worker("a", 0, speed=9), worker("b", 0), worker("c")]
    assert names(place(2, pool, holders={0: "b", 1: "c"})) == {0: "b", 1: "c"}


def test_who_has_the_weights_is_preferred_among_standbys() -> None:
    pool = [worker("fast", speed=5), worker("warm", kept=(4, 8)), worker("a", 0)]
    assert names(place(2, pool, ranges=[(0, 4), (4, 8)], holders={0: "a", 1: "gone"}))[1] == "warm"


def test_the_fast_ones_first_or_the_roomy_ones() -> None:
    pool = [worker("slow", memory=9), worker("fast", speed=2, memory=5)]
    assert names(place(1, pool)) == {0: "fast"}
    assert names(place(1, pool, by_memory=True)) == {0: "slow"}


def test_a_refused_pair_is_left_out() -> None:
    pool = [worker("a"), worker("b")]
    assert names(place(1, pool, refused=frozenset({("a", 0)}))) == {0: "b"}
    assert place(1, pool[:1], refused=frozenset({("a", 0)})).missing == (0,)


def test_a_free_holder_moves_where_only_it_can_help() -> None:
    pool = [worker("free"), worker("bound", 0)]
    assert names(place(2, pool, holders={0: "free"})) == {0: "bound", 1: "free"}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(-1, 4), max_size=8), st.integers(0, 99))
def test_as_many_stages_as_can_be_are_covered_by_different_workers(stages: int, pools: list[int], seed: int) -> None:
    pool = [worker(f"w{i}", p) for i, p in enumerate(pools)]
    holder = {s: f"w{random.Random(seed + s).randrange(9)}" for s in range(stages)}
    placed = place(stages, pool, holders=holder)
    used = list(names(placed).values())
    assert len(set(used)) == len(used)
    assert all(c.pool in (stage, -1) for stage, c in placed.workers.items())
    bound = {p for p in pools if 0 <= p < stages}
    assert len(used) == min(stages, len(bound) + pools.count(-1))
    assert sorted([*used, *(c.worker_id for c in placed.standby)]) == sorted(c.worker_id for c in pool)


@pytest.mark.parametrize("stages", [1, 2])
def test_nobody_there(stages: int) -> None:
    assert place(stages, []).missing == tuple(range(stages))
