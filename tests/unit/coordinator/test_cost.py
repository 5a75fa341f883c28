"""The cost model: what streaming, computing, memory and KV come to, on numbers that a reader can check by hand."""

from __future__ import annotations

import dataclasses

import pytest
from mesh_world import introduction

from stagemesh.coordinator.planning.kinds import NOMINAL_BYTES_PER_S, kinds
from stagemesh.models.size import CheckpointInfo, Part
from stagemesh.planning.cost import CostModel, Kind
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest
from stagemesh.protos.v1.types_pb2 import RunLimits

LIMITS = RunLimits(
    max_model_len=100, max_num_seqs=12, max_num_batched_tokens=64, page_size=16, num_pages=0, steps_in_flight=3
)
INFO = CheckpointInfo(
    hidden_size=8, vocab_size=50, dtype="float32", max_position_embeddings=512, num_kv_heads=2,
    kv_elements_per_token=8, tied=False, layers=(Part(1000, 2000.0),) * 4, embedding=Part(400), head=Part(408, 800.0),
)  # fmt: skip


STREAMS = Kind(1, 0, flops_per_s=1e12, bytes_per_s=1e6)  # bound by memory
COMPUTES = Kind(1, 0, flops_per_s=1e5, bytes_per_s=1e12)  # bound by arithmetic


def limits(**changes: int) -> RunLimits:
    changed = RunLimits()
    changed.CopyFrom(LIMITS)
    changed.MergeFrom(RunLimits(**changes))
    return changed


def test_a_step_takes_the_longer_of_streaming_and_computing() -> None:
    model = CostModel(INFO, LIMITS, "float32")
    assert model.rows == 4  # 12 sequences spread over 3 steps in flight
    assert model.stage_seconds(STREAMS, 1, 2) == pytest.approx(4000 / 1e6)
    assert model.stage_seconds(COMPUTES, 1, 2) == pytest.approx(4 * 2000 / 1e5)
    full = CostModel(INFO, limits(max_num_seqs=3 * 64), "float32")
    assert full.stage_seconds(STREAMS, 1, 2) == pytest.approx(4000 / 1e6)
    assert full.stage_seconds(COMPUTES, 1, 2) == pytest.approx(64 * 2000 / 1e5)


def test_the_ends_belong_to_the_first_and_the_last_stage() -> None:
    model = CostModel(INFO, LIMITS, "float32")
    layer, embed, head = 4000 / 1e6, 4 * 8 * 4 / 1e6, 1632 / 1e6
    assert model.stage_seconds(STREAMS, 0, 2) == pytest.approx(2 * layer + embed)
    assert model.stage_seconds(STREAMS, 2, 4) == pytest.approx(2 * layer + head)
    assert model.stage_seconds(STREAMS, 1, 3) == pytest.approx(2 * layer)
    assert model.stage_seconds(STREAMS, 0, 4) == pytest.approx(4 * layer + embed + head)


def test_two_ranks_halve_a_layer() -> None:
    model = CostModel(INFO, LIMITS, "float32")
    two = dataclasses.replace(STREAMS, tp_size=2)
    assert model.stage_seconds(two, 1, 2) == pytest.approx(model.stage_seconds(STREAMS, 1, 2) / 2)


def test_memory_counts_weights_and_whole_pages_of_kv() -> None:
    model = CostModel(INFO, LIMITS, "bfloat16")
    tokens = 7 * 16  # 100 tokens in whole pages
    assert model.kv_bytes_per_token(STREAMS) == 8 * 2
    assert model.memory(STREAMS)[2] - model.memory(STREAMS)[1] == 1000 * 2 + 16 * tokens
    short = model.memory(STREAMS, max_model_len=10)
    assert short[2] - short[1] == 1000 * 2 + 16 * 16


def test_pages_asked_for_by_number_are_counted() -> None:
    memory = CostModel(INFO, limits(num_pages=100), "bfloat16").memory(STREAMS)
    assert memory[2] - memory[1] == 1000 * 2 + 16 * 1600


def test_kv_heads_fewer_than_ranks_are_replicated() -> None:
    model = CostModel(INFO, LIMITS, "float32")
    per_rank = [model.kv_bytes_per_token(dataclasses.replace(STREAMS, tp_size=n)) for n in (1, 2, 4)]
    assert per_rank == [32, 16, 16]


def test_a_draft_model_lies_whole_on_the_last_stage() -> None:
    plain, drafted = (CostModel(INFO, LIMITS, "bfloat16", draft) for draft in (None, INFO))
    assert drafted.stage_memory(STREAMS, 0, 2) == plain.stage_memory(STREAMS, 0, 2)
    of_it = 2 * (4 * 1000 + 400 + 408) + 4 * 16 * 7 * 16
    assert drafted.stage_memory(STREAMS, 2, 4) == plain.stage_memory(STREAMS, 2, 4) + of_it
    two = dataclasses.replace(STREAMS, tp_size=2)
    assert drafted.stage_memory(two, 2, 4) == plain.stage_memory(two, 2, 4) + of_it


def test_a_range_fits_or_not() -> None:
    model = CostModel(INFO, LIMITS, "float32")
    need = model.stage_memory(STREAMS, 0, 2)
    assert model.fits(dataclasses.replace(STREAMS, memory_bytes=int(need) + 1), 0, 2)
    assert not model.fits(dataclasses.replace(STREAMS, memory_bytes=int(need) - 1), 0, 2)
    assert model.fits(dataclasses.replace(STREAMS, memory_bytes=0), 0, 4)  # unknown: the worker decides itself


def worker(name: str, rate: float) -> RegisterRequest:
    return introduction(name, bytes_per_s=rate)


def test_measurements_that_are_close_are_one_kind() -> None:
    a, b, c = kinds([worker("a", 10e9), worker("b", 11.9e9), worker("c", 20e9)])
    assert a == b
    assert a.bytes_per_s == 10e9
    assert c.bytes_per_s == 20e9


def test_a_rate_that_was_not_measured_is_nominal() -> None:
    (only,) = kinds([worker("a", 0.0)])
    assert only.bytes_per_s == NOMINAL_BYTES_PER_S
