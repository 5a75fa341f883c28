"""One pipeline as a gateway drives it: when others go on with what it runs, and what it costs while it fails."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from stagemesh.errors import StageLost, Unavailable
from stagemesh.gateway.drive import driver as module
from stagemesh.gateway.drive.driver import Drive, Surroundings
from stagemesh.gateway.drive.ledger import Work
from stagemesh.gateway.drive.session import BatchLoop
from stagemesh.gateway.drive.slot_lease import Seat
from stagemesh.protos.v1 import types_pb2

NAME = "pipeline-1"


def view(state: str, epoch: int = 4, **more: Any) -> types_pb2.PipelineView:
    return types_pb2.PipelineView(
        pipeline_id=NAME, epoch=epoch, state=types_pb2.PipelineState.Value(f"PIPELINE_STATE_{state}"), **more
    )


async def no_model(_: types_pb2.PipelineView) -> None:
    return None


def make(seat: Seat | None = None, deadline_s: float = 60.0) -> Drive:
    settings: Any = SimpleNamespace(recovery_deadline=deadline_s)
    around = Surroundings(
        settings, seat or Seat("g"), MagicMock(), MagicMock(), MagicMock(), MagicMock(), deque(), no_model,
        MagicMock(), lambda: None,
    )  # fmt: skip
    return Drive(NAME, around)


def serving(drive: Drive) -> MagicMock:
    """A request on a loop that is driven."""
    live = MagicMock()
    work = SimpleNamespace(live={1: live}, fail=lambda e: live.fail(e), end=lambda: None, withdraw=lambda r: None)
    loop = MagicMock(lost=None, key=(NAME, 3), stuck=False)
    loop.fail = lambda error: drive._on_lost(loop, error)
    drive.work, drive.loop = cast(Work, work), cast(BatchLoop, loop)
    return live


@pytest.mark.parametrize(
    ("state", "waits_s"), [("DOWN", 0.0), ("FORMING", module.PATIENCE_S), ("DRAINING", module.FINISH_S)]
)
def test_what_it_runs_goes_on_elsewhere(state: str, waits_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        drive = make()
        live = serving(drive)
        assert not drive.gives_up
        drive.follow(view(state, epoch=3 if state == "DRAINING" else 4))
        assert drive.gives_up == (waits_s == 0.0)
        now += waits_s + 0.1
        assert drive.gives_up
        assert drive.hand_out("pipeline-0") == [live]
        assert not live.fail.called
        assert not drive.outage.open
        drive.outage.close()

    asyncio.run(go())


def test_requests_of_a_pipeline_that_is_no_more_do_not_wait_for_ever() -> None:
    """Where no other one serves."""

    async def go() -> None:
        drive = make(deadline_s=0.05)
        live = serving(drive)
        ended = asyncio.Event()
        live.fail.side_effect = lambda _: ended.set()
        drive.follow(None)
        await asyncio.wait_for(ended.wait(), 5)
        (error,) = live.fail.call_args.args
        assert isinstance(error, StageLost)

    asyncio.run(go())


def test_it_is_left_when_nothing_of_it_is_under_way() -> None:
    async def go() -> None:
        drive = make()
        drive.follow(view("DRAINING", leaving=True))
        assert drive.left
        drive._opening = True
        assert not drive.left
        drive._opening = False
        drive._moving = asyncio.create_task(asyncio.sleep(60))
        assert not drive.left
        drive._moving.cancel()
        await asyncio.gather(drive._moving, return_exceptions=True)
        assert drive.left

    asyncio.run(go())


def test_an_epoch_before_one_that_was_driven_is_not_gone_back_to() -> None:
    async def go() -> None:
        drive = make(Seat("g"))
        drive._around.seat.slot = 1
        drive._driven = 5
        drive.follow(view("SERVING", epoch=4))
        running = asyncio.create_task(drive.run())
        reporter = cast(MagicMock, drive._around.reporter)
        async with asyncio.timeout(5):
            while not reporter.moved.called:
                await asyncio.sleep(0)
        assert reporter.moved.call_args.args == (NAME, 5)
        assert drive.loop is None
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(go())


class Unopened:
    """A loop whose sessions cannot be opened."""

    lost, key, crossed, unreachable, tries = None, (NAME, 4), False, ("worker-b",), 0

    def __init__(self, *_: object) -> None:
        pass

    async def start(self, *_: object) -> None:
        type(self).tries += 1
        raise Unavailable("of 8 pages 0 are free")

    async def stop(self) -> None:
        pass

    async def close(self) -> None:
        pass


def in_vain(monkeypatch: pytest.MonkeyPatch) -> tuple[Drive, type[Unopened]]:
    """A drive of such loops, which is told again and again of the same pipeline."""

    class Loop(Unopened):
        pass

    seat = Seat("g")
    drive = make(seat)
    monkeypatch.setattr(module, "BatchLoop", Loop)
    monkeypatch.setattr(module, "make_work", lambda *_: MagicMock())

    def renewed() -> None:
        # The coordinator answers with a slot, and with the same view.
        seat.slot = Loop.tries + 1
        drive.follow(view("SERVING"))

    seat.on_renew = renewed
    renewed()
    return drive, Loop


def test_sessions_that_cannot_be_opened_do_not_use_up_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        drive, loop = in_vain(monkeypatch)
        running = asyncio.create_task(drive.run())
        await asyncio.wait([running], timeout=1.2)
        assert 2 <= loop.tries <= 3
        drive.follow(view("SERVING", epoch=5))
        loop.key = (NAME, 5)
        before = loop.tries
        await asyncio.wait([running], timeout=0.1)
        assert loop.tries == before + 1, "another epoch is tried at once"
        running.cancel()

    asyncio.run(go())


def test_the_coordinator_hears_of_a_worker_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_VAIN_S", 0.3)

    async def go() -> None:
        drive, _ = in_vain(monkeypatch)
        reporter = cast(MagicMock, drive._around.reporter)
        running = asyncio.create_task(drive.run())
        async with asyncio.timeout(5):
            while not reporter.stuck.called:
                await asyncio.sleep(0.01)
        running.cancel()
        name, epoch, reason, unreachable = reporter.stuck.call_args.args
        assert (name, epoch, list(unreachable)) == (NAME, 4, ["worker-b"])
        assert "worker-b cannot be reached" in reason

    asyncio.run(go())
