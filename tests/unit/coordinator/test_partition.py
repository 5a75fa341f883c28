"""The cut of the layers: against brute force over all cuts, and every refusal with its numbers and its way out."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.coordinator.planning.placement import Candidate, place
from stagemesh.coordinator.values import Range
from stagemesh.errors import ConfigError
from stagemesh.models.size import CheckpointInfo, Part
from stagemesh.planning.cost import CostModel, Kind
from stagemesh.planning.partition import check_counts, even_ranges, partition
from stagemesh.protos.v1.types_pb2 import RunLimits

MIB = 1 << 20


def model(
    layers: list[int], *, head: int = 0, embedding: int = 0, max_model_len: int = 16, vocab: int = 1
) -> CostModel:
    """`layers`, `head`, `embedding`: parameters; each costs one byte streamed in float32 / 4."""
    limits = RunLimits(
        max_model_len=max_model_len, max_num_seqs=1, max_num_batched_tokens=1, page_size=16, steps_in_flight=1
    )
    info = CheckpointInfo(
        hidden_size=1, vocab_size=vocab, dtype="float32", max_position_embeddings=4096, num_kv_heads=1,
        kv_elements_per_token=2, tied=False, layers=tuple(Part(n, 2.0 * n) for n in layers),
        embedding=Part(embedding), head=Part(head, 2.0 * head),
    )  # fmt: skip
    return CostModel(info, limits, "float32")


def kind(speed: float = 1.0, memory: int = 0, tp: int = 1) -> Kind:
    return Kind(tp, memory, flops_per_s=1e12 * speed, bytes_per_s=1e6 * speed)


def slowest(cost: CostModel, workers: list[Kind], ranges: list[Range]) -> float:
    return max(cost.stage_seconds(k, *r) for k, r in zip(workers, ranges, strict=True))


def all_cuts(num_layers: int, stages: int) -> list[list[Range]]:
    inner = itertools.combinations(range(1, num_layers), stages - 1)
    return [list(itertools.pairwise((0, *cuts, num_layers))) for cuts in inner]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    speeds=st.lists(st.sampled_from([1.0, 2.0, 3.5]), min_size=1, max_size=5),
    memories=st.lists(st.sampled_from([0, 600, 1500]), min_size=5, max_size=5),
    head=st.integers(0, 60),
    embedding=st.integers(0, 60),
)
def test_no_cut_is_better(
    layers: list[int], speeds: list[float], memories: list[int], head: int, embedding: int
) -> None:
    speeds = speeds[: len(layers)]
    cost = model(layers, head=head, embedding=embedding)
    workers = [kind(s, m) for s, m in zip(speeds, memories, strict=False)]
    fitting = [
        cut
        for cut in all_cuts(len(layers), len(workers))
        if all(cost.fits(k, *r) for k, r in zip(workers, cut, strict=True))
    ]
    if not fitting:
        with pytest.raises(ConfigError):
            partition(cost, workers)
        return
    found = partition(cost, workers)
    assert found in fitting  # contiguous, whole, each stage at least one layer, all within memory
    best = min(slowest(cost, workers, cut) for cut in fitting)
    assert slowest(cost, workers, found) == pytest.approx(best)
    squares = [
        sum(cost.stage_seconds(k, *r) ** 2 for k, r in zip(workers, cut, strict=True))
        for cut in [found, *(c for c in fitting if slowest(cost, workers, c) <= best * (1 + 1e-9))]
    ]
    assert squares[0] == pytest.approx(min(squares))  # and the most even of the best


def test_equal_workers_share_evenly() -> None:
    assert partition(model([10] * 12), [kind()] * 3) == [(0, 4), (4, 8), (8, 12)]


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    assert partition(model([10] * 12, head=40), [kind(), kind()]) == [(0, 8), (8, 12)]


def test_a_worker_twice_as_fast_holds_twice_as_much() -> None:
    assert partition(model([10] * 12), [kind(1), kind(2)]) == [(0, 4), (4, 12)]


def test_memory_overrules_speed() -> None:
    cost = model([10] * 12)
    room = int(cost.stage_memory(kind(), 7, 12))
    assert partition(cost, [kind(1), kind(100, room)]) == [(0, 7), (7, 12)]


def test_the_partition_asked_for_is_taken() -> None:
    assert partition(model([10] * 12), [kind()] * 2, [5, 7]) == [(0, 5), (5, 12)]


@pytest.mark.parametrize(
    ("layers", "stages", "counts", "words"),
    [
        (4, 5, None, ["-size 5", "4 layers", "-pp 4"]),
        (12, 2, [5, 6], ["5,6", "11", "12", "1 layers would be held by nobody", "6,6"]),
        (12, 2, [7, 7], ["7,7", "14", "12", "2 more than there are", "6,6"]),
        (12, 2, [4, 4, 4], ["names 3 stages", "is 2", "6,6", "-pp 3"]),
        (12, 3, [12, 0, 0], ["stage 1", "0 layers", "4,4,4"]),
        (12, 2, [13, -1], ["stage 1", "-1 layers"]),
    ],
)
def test_counts_that_cannot_be(layers: int, stages: int, counts: list[int] | None, words: list[str]) -> None:
    with pytest.raises(ConfigError) as e:
        check_counts(layers, stages, counts)
    for word in words:
        assert word in e.value.message, e.value.message


def test_what_would_fit_is_said_and_true() -> None:
    layers, length = [MIB] * 12, 16384
    cost = model(layers, max_model_len=length)
    room = int(cost.stage_memory(kind(), 8, 12)) + 1  # four layers a worker, with the KV of the longest sequence
    with pytest.raises(ConfigError) as e:
        partition(cost, [kind(1, room)] * 2)
    assert "needs 3 stages" in e.value.message, e.value.message
    assert "MiB" in e.value.message
    assert partition(cost, [kind(1, room)] * 3) == [(0, 4), (4, 8), (8, 12)]


def test_a_shorter_longest_sequence_that_would_fit_is_said_and_true() -> None:
    layers = [1000] * 4
    room = int(model(layers, max_model_len=1536).stage_memory(kind(), 2, 4)) + 1
    with pytest.raises(ConfigError) as e:
        partition(model(layers, max_model_len=4096), [kind(1, room)] * 2)
    assert "--max-model-len 1536 would fit" in e.value.message, e.value.message
    assert partition(model(layers, max_model_len=1536), [kind(1, room)] * 2)
    with pytest.raises(ConfigError):
        partition(model(layers, max_model_len=1536 + 16), [kind(1, room)] * 2)


def test_one_layer_that_fits_nowhere() -> None:
    with pytest.raises(ConfigError, match="not even one layer"):
        partition(model([MIB] * 2), [kind(1, 1000)] * 2)


def test_a_partition_asked_for_that_does_not_fit_names_the_stage() -> None:
    cost = model([MIB] * 12)
    room = int(cost.stage_memory(kind(), 0, 6)) + 1
    with pytest.raises(ConfigError, match=re.escape("stage 1 (layers 5-11)")):
        partition(cost, [kind(1, room)] * 2, [5, 7])


def test_even_ranges_cover_everything_once() -> None:
    assert even_ranges(7, 3) == [(0, 3), (3, 5), (5, 7)]


@pytest.mark.parametrize("stages", [4, 100, 400])
def test_a_thousand_workers_of_five_kinds_and_400_layers_within_a_second(stages: int) -> None:
    five = [kind(1 + k / 2, (400 // stages + 3) * 5 * MIB * (1 + k)) for k in range(5)]
    candidates = [Candidate(f"worker-{n}", -1, five[n % 5]) for n in range(1000)]
    cost = model([MIB] * 400, head=3 * MIB)
    start = time.process_time()  # not the wall's: the machine may have other things to do
    placed = place(stages, candidates)
    ranges = partition(cost, [placed.workers[s].kind for s in range(stages)])
    took_s = time.process_time() - start
    assert [first for first, _ in ranges] == [0, *[last for _, last in ranges[:-1]]]
    assert ranges[-1][1] == 400
    assert took_s < 1.0, f"{took_s:.2f} s"
