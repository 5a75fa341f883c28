"""Loading beside serving takes what steps leave of the processor, but never the interpreter's lock from them."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from typing import Any, cast

import pytest

from stagemesh.protos.v1 import stage_pb2
from stagemesh.stage_worker.rank.memory.preparing import NICE, Preparing
from stagemesh.stage_worker.rank.memory.rank_memory import RankMemory

DEADLINE_S = 10.0


class Memory:
    """Notes how a load is scheduled."""

    nice: int | None = None

    def load(self, request: stage_pb2.PrepareRequest, note: Any) -> list[Any]:
        self.nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return []


@pytest.mark.parametrize("serves", [False, True])
@pytest.mark.parametrize("more", [0, 15])
def test_a_load_gives_way_where_its_rank_serves_nothing(more: int, serves: bool) -> None:
    """`more`: how much nicer the rank is already, as under `nice -n 15`; not everybody may take that back."""
    memory, outcomes, own = Memory(), list[Any](), min(19, os.getpriority(os.PRIO_PROCESS, 0) + more)

    def engine() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own)
        preparing = Preparing(
            cast(RankMemory, memory), lambda *told: None, lambda *done: outcomes.append(done[2].result()), 1.0
        )
        preparing.start(1, stage_pb2.PrepareRequest(), serves=serves)
        deadline = time.monotonic() + DEADLINE_S
        while not outcomes and time.monotonic() < deadline:
            preparing.poll()

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert outcomes == [[]]
    assert memory.nice == (own if serves else max(NICE, own))


def test_a_shard_that_was_handed_over_is_not_kept() -> None:
    """Its memory is for what is loaded next."""

    class Loaded(Memory):
        def load(self, request: stage_pb2.PrepareRequest, note: Any) -> list[Any]:
            return [Memory()]

    found: list[weakref.ref[Memory]] = []
    rank_memory = cast(RankMemory, Loaded())
    preparing = Preparing(
        rank_memory, lambda *told: None, lambda *done: found.append(weakref.ref(done[2].result()[0])), 1.0
    )
    preparing.start(1, stage_pb2.PrepareRequest(), serves=True)
    preparing.join()
    gc.collect()
    assert [shard() for shard in found] == [None]
