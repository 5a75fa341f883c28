"""How many decode steps are in flight, by what a step costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stagemesh.models.size import CheckpointInfo, ModelConfig, estimated
from stagemesh.planning.limits import default_steps
from stagemesh.planning.steps import best_steps, interval_s, tokens_per_s
from stagemesh.protos.v1.types_pb2 import RunLimits


def test_a_step_leaves_as_often_as_the_slowest_stage_or_the_round_trip_allows() -> None:
    assert interval_s([2.0, 3.0], 1) == 5.0
    assert interval_s([2.0, 3.0], 2) == 3.0
    assert interval_s([3.0, 3.0], 2, hop_s=0.5) == 3.5
    assert interval_s([3.0, 3.0], 3, hop_s=0.5) == 3.0


def test_rows_are_spread_over_no_more_steps_than_there_are_rows() -> None:
    assert tokens_per_s(lambda rows: [1.0, 1.0], 1, 3) == pytest.approx(0.5)
    assert tokens_per_s(lambda rows: [1.0 + rows, 1.0 + rows], 8, 2) == pytest.approx(8 / 10)


def test_one_more_step_fills_what_hops_leave_idle_and_no_more() -> None:
    """Weights take 1 s of a step, and each row 0.1 s."""
    for hop_s, steps in ((0.3, 2), (0.45, 2), (0.6, 3), (2.0, 3)):
        assert best_steps(lambda rows: [1 + 0.1 * rows] * 2, 24, (1, 2, 3), hop_s) == steps, hop_s


def test_experts_make_fewer_steps_than_a_dense_model_of_as_many_active_weights() -> None:
    """32 experts of which a token uses 4, two stages: a step of 4 rows reads 0.41 of them, one of 3 rows 0.33."""

    def sparse(rows: int) -> list[float]:
        return [32 / 4 * (1 - (1 - 4 / 32) ** rows)] * 2

    def dense(rows: int) -> list[float]:
        return [1.0, 1.0]

    assert best_steps(dense, 8, (2, 3), hop_s=0.5) == 3
    assert best_steps(sparse, 8, (2, 3), hop_s=0.5) == 2


def test_a_stage_that_is_far_slower_than_the_others_makes_fewer_steps() -> None:
    """More of them would wait before it, and each reads its weights."""
    assert best_steps(lambda rows: [3 + 0.01 * rows, 0.5, 0.5], 12, range(1, 5)) == 1
    assert best_steps(lambda rows: [1 + 0.01 * rows] * 3, 12, range(1, 5)) == 3


def model(**changes: Any) -> CheckpointInfo:
    numbers = {
        "model_type": "llama", "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048,
        "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 16384, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = ModelConfig({**numbers, **changes}, Path("config.json"))
    return config.info(estimated(config), "bfloat16", tied=False)


def default(info: CheckpointInfo, stages: int, sequences: int = 32) -> int:
    limits = RunLimits(max_model_len=1024, max_num_seqs=sequences, max_num_batched_tokens=512, page_size=16)
    return default_steps(info, limits, "bfloat16", stages)


def test_few_stages_get_a_step_each() -> None:
    """As always: figures were measured so."""
    tiny = model(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=256)
    large = model(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, intermediate_size=28672)
    for info in (tiny, model(), large):
        assert [default(info, stages) for stages in (1, 2, 3)] == [1, 2, 3]
    assert default(model(num_experts=8, num_experts_per_tok=2), 2) == 2


def test_many_stages_get_one_more_if_steps_are_short() -> None:
    tiny = model(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=256)
    assert [default(tiny, stages) for stages in (4, 6, 12)] == [5, 7, 13]
    assert [default(model(), stages, 40) for stages in (4, 12)] == [4, 13]
    # Four of 32 experts are as many active weights as the dense MLP. A step of ten rows reads three quarters of all.
    sparse = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
    small = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    assert default(model(**small, intermediate_size=1024), 4, 40) == 5
    assert default(model(**small, **sparse), 4, 40) == 4
