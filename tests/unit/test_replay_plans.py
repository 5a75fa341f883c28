"""What a plan of kind REPLAY means to each stage, and which ones are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagemesh.errors import InvalidRequest, StaleEpoch
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.stage_worker.rank.session import Session, SessionContext

STAGES = 4


def session(stage: int) -> Session:
    context = SessionContext(
        epoch=2, stage=stage, is_last=stage == STAGES - 1, samples=stage == STAGES - 1, vocab_size=50, page_size=4,
        pages=tuple(range(8)), max_tokens=64, device=torch.device("cpu"),
    )  # fmt: skip
    made = Session(1, 1, context)
    made.open_sequence(stage_pb2.OpenSequence(sequence=1, sampling=types_pb2.SamplingParams(), prompt_len=10))
    return made


def replay(first: int, last: int, start: int = 0, count: int = 9, step: int = 1, **more: Any) -> stage_pb2.StepPlan:
    pages = [0, 1, 2] if step == 1 else []
    return stage_pb2.StepPlan(
        step=step, epoch=2, kind=stage_pb2.STEP_KIND_REPLAY, sequences=[1], starts=[start], counts=[count],
        tokens=[7] * count, new_page_counts=[len(pages)], new_pages=pages, replay_first=first, replay_last=last, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "computing", "sending", "receiving"),
    [
        (1, 1, {1}, {0}, {1}),
        (1, 2, {1, 2}, {0, 1}, {1, 2}),
        (0, 0, {0}, set(), set()),
        (0, 3, {0, 1, 2, 3}, {0, 1, 2}, {1, 2, 3}),
        (3, 3, {3}, {2}, {3}),
    ],
)
def test_who_computes_who_sends_and_who_has_no_part_in_it(
    first: int, last: int, computing: set[int], sending: set[int], receiving: set[int]
) -> None:
    steps = [session(stage).add_plan(replay(first, last)) for stage in range(STAGES)]
    assert {i for i, step in enumerate(steps) if step.computes} == computing
    assert {i for i, step in enumerate(steps) if step.sends} == sending
    assert {i for i, step in enumerate(steps) if step.receives} == receiving
    assert not any(step.sampled for step in steps)


def test_a_sequence_goes_on_behind_what_was_replayed_or_kept() -> None:
    made = session(2)
    made.add_plan(replay(1, 1))
    made.add_plan(replay(3, 3, start=4, count=5, step=2))
    run = stage_pb2.StepPlan(
        step=3, epoch=2, kind=stage_pb2.STEP_KIND_RUN, sequences=[1], starts=[9], counts=[1], tokens=[3],
        new_page_counts=[0], sample_rows=[0],
    )  # fmt: skip
    step = made.add_plan(run)
    assert (step.computes, step.receives, step.sends) == (True, True, True)
    assert list(step.batch.tables[0]) == [0, 1, 2]


def test_what_others_fill_behind_what_was_replayed_is_held_too() -> None:
    """Its first page was its own, equal to another's; what is behind it they share."""
    made = session(2)
    made.add_plan(replay(1, 1, count=4))
    made.add_plan(replay(1, 1, start=8, count=1, step=2))
    run = stage_pb2.StepPlan(
        step=3, epoch=2, kind=stage_pb2.STEP_KIND_RUN, sequences=[1], starts=[11], counts=[1], tokens=[3],
        new_page_counts=[0], sample_rows=[0],
    )  # fmt: skip
    assert list(made.add_plan(run).batch.tables[0]) == [0, 1, 2]
    run.step, run.starts[0] = 4, 13
    with pytest.raises(InvalidRequest, match="starts sequence 1 at 13, but it holds 12 positions"):
        made.add_plan(run)


@pytest.mark.parametrize("wrong", [{"first": 2, "last": 1}, {"first": 1, "last": 1, "sample_rows": [0]}])
def test_what_no_replay_can_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="a replay cannot"):
        session(1).add_plan(replay(**wrong))


@pytest.mark.parametrize("kind", [stage_pb2.STEP_KIND_RUN, stage_pb2.STEP_KIND_REPLAY])
def test_a_plan_of_an_earlier_epoch_is_refused(kind: stage_pb2.StepKind) -> None:
    made, late = session(1), replay(1, 1)
    late.epoch, late.kind = 1, kind
    with pytest.raises(StaleEpoch, match="plan of epoch 1 in a session of epoch 2"):
        made.add_plan(late)
    assert made.last_planned == 0
