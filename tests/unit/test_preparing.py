"""Loading beside serving takes what steps leave of the processor, but never the interpreter's lock from them."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, cast

import pytest

from stagemesh.protos.v1 import stage_pb2
from stagemesh.stage_worker.preparing import NICE, Preparing
from stagemesh.stage_worker.rank_memory import RankMemory

DEADLINE_S = 10.0


class Memory:
    """Notes how a load is scheduled."""

    nice: int | None = None

    def load(self, request: stage_pb2.PrepareRequest, note: Any) -> list[Any]:
        self.nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return []


@pytest.mark.parametrize(("own", "serves", "wanted"), [(0, False, NICE), (0, True, 0), (15, False, 15), (15, True, 15)])
def test_a_load_gives_way_where_its_rank_serves_nothing(own: int, serves: bool, wanted: int) -> None:
    """`own`: how nice the rank is already, as under `nice -n 15`; nobody may ask for more of the processor again."""
    memory, outcomes = Memory(), list[Any]()

    def engine() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own)
        preparing = Preparing(cast(RankMemory, memory), lambda *told: None, lambda *done: outcomes.append(done[2]))
        preparing.start(1, stage_pb2.PrepareRequest(), serves=serves)
        deadline = time.monotonic() + DEADLINE_S
        while not outcomes and time.monotonic() < deadline:
            preparing.poll()

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    assert outcomes == [[]]
    assert memory.nice == wanted
