"""A step runs when the pages are there that were announced before it, and never sooner."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from benchmarks.scale.sleep_shard import MODEL_TYPE, SleepShard
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.stage_worker.kv.copy import PageReceiver
from stagemesh.stage_worker.kv.journal import Journal
from stagemesh.stage_worker.kv.page_ranges import PageRanges
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.rank.assignment import Assignment
from stagemesh.stage_worker.rank.memory.resources import StageResources

KEY = stage_pb2.PipelineKey(pipeline_id="p", epoch=2)


def resources(folder: Path) -> StageResources:
    (folder / "config.json").write_text(
        json.dumps({"model_type": MODEL_TYPE, "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 100,
                    "step_seconds": 0.0})
    )  # fmt: skip
    shard = SleepShard(ShardSpec(str(folder), 0, 1, load_format="dummy"))
    pool = KvPool(shard.kv_layers, 8, 16, torch.bfloat16, "cpu")
    return StageResources(shard, pool, None, PageRanges(8, itertools.count(1).__next__), None, 0, [])


def plan(step: int) -> stage_pb2.StepPlan:
    return stage_pb2.StepPlan(
        step=step, epoch=2, kind=stage_pb2.STEP_KIND_RUN, sequences=[1], starts=[step - 1], counts=[1], tokens=[5],
        new_page_counts=[step == 1], new_pages=[3] if step == 1 else [], sample_rows=[0],
    )  # fmt: skip


def test_a_step_waits_for_what_was_announced_before_it(tmp_path: Path) -> None:
    limits = types_pb2.RunLimits(max_num_batched_tokens=16, page_size=16, steps_in_flight=2)
    assignment = Assignment(stage_pb2.AssignRequest(key=KEY, num_stages=1, limits=limits), resources(tmp_path), 0)
    assignment.active = True
    assignment.open_session(7, stage_pb2.RunOpen(key=KEY, gateway_id="g", slot=1))
    session = assignment.sessions[7]
    session.open_sequence(stage_pb2.OpenSequence(sequence=1))
    session.copies = {(0, 1), (1, 1)}
    assignment.add_plan(session, plan(1))
    session.copies.add((0, 2))
    first = session.steps[1]
    assert not assignment.can_run(session, first)
    session.copies.discard((0, 1))
    assert not assignment.can_run(session, first)
    session.copies.discard((1, 1))
    assert assignment.can_run(session, first), "what was announced behind it is another step's affair"
    assignment.add_plan(session, plan(2))
    assert not assignment.can_run(session, session.steps[2])


def test_what_a_journal_has_of_others_is_forgotten(tmp_path: Path) -> None:
    """Of whoever had the pages before: another pipeline, or this one at another boundary."""
    forgotten: list[int] = []
    limits = types_pb2.RunLimits(max_num_batched_tokens=16, page_size=16, steps_in_flight=2)
    journal = SimpleNamespace(forget=forgotten.extend, held=lambda pages: b"", number=5)
    there = dataclasses.replace(resources(tmp_path), journal=cast(Journal, journal))
    for epoch, new in ((2, True), (3, False)):
        key = stage_pb2.PipelineKey(pipeline_id="p", epoch=epoch)
        assignment = Assignment(stage_pb2.AssignRequest(key=key, num_stages=1, limits=limits), there, 0)
        assignment.active = True
        forgotten.clear()
        assignment.open_session(epoch, stage_pb2.RunOpen(key=key, gateway_id="g", slot=1))
        assert sorted(forgotten) == (list(range(8)) if new else [])


def test_pages_that_are_copied_here_were_written_elsewhere(tmp_path: Path) -> None:
    forgotten: list[int] = []
    limits = types_pb2.RunLimits(max_num_batched_tokens=16, page_size=16, steps_in_flight=2)
    journal = SimpleNamespace(forget=forgotten.extend, held=lambda pages: b"", number=5)
    there = dataclasses.replace(resources(tmp_path), journal=cast(Journal, journal))
    assignment = Assignment(stage_pb2.AssignRequest(key=KEY, num_stages=1, limits=limits), there, 0)
    assignment.active = True
    receiver = SimpleNamespace(
        expect=lambda *a: None, frames=SimpleNamespace(most_pages=4), link=SimpleNamespace(open_lane=lambda slot: None)
    )
    assignment.page_receivers[0] = cast(PageReceiver, receiver)
    assignment.open_session(7, stage_pb2.RunOpen(key=KEY, gateway_id="g", slot=1))
    session = assignment.sessions[7]
    forgotten.clear()
    assignment.copy_pages(session, stage_pb2.CopyPages(epoch=2, index=0, number=1, pages=[2, 5]))
    assert forgotten == [session.context.pages[2], session.context.pages[5]]
