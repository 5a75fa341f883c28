"""One pipeline as a gateway drives it: its states, when others go on with what it runs, and what failures cost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from stagemesh.errors import InternalError, RanksDied, StageLost, StagemeshError, Unavailable
from stagemesh.gateway.drive.driver import PipelineDriver, Surroundings
from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.drive.loop import BatchLoop, Observers
from stagemesh.gateway.drive.states import TRANSITIONS, Event, State
from stagemesh.gateway.schedule.pages import Shape
from stagemesh.gateway.schedule.sequence import Sequence
from stagemesh.gateway.session.slot_lease import SlotLease
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.protos.v1 import types_pb2

NAME = "pipeline-1"
TIMING = GatewayTiming()


def view(state: str, epoch: int = 4, **more: Any) -> types_pb2.PipelineView:
    made = types_pb2.PipelineView(
        pipeline_id=NAME, epoch=epoch, state=types_pb2.PipelineState.Value(f"PIPELINE_STATE_{state}"), **more
    )
    made.limits.max_num_seqs, made.limits.max_num_batched_tokens = 4, 16
    return made


class FakeLoop:
    """A loop whose sessions open at once, or cannot be opened; a token crosses it when the test says so."""

    def __init__(self, view: types_pb2.PipelineView, ledger: Ledger, *rest: Any) -> None:
        *_, self.on_crossed, self.on_lost = rest
        self.view, self.ledger = view, ledger
        self.key = view.pipeline_id, view.epoch
        self.crossed = self.stuck = self.closed = False
        self.lost: StagemeshError | None = None
        self.refusal: StagemeshError | None = None
        self.probes = 0
        self.session = SimpleNamespace(unreachable=["worker-b"])

    async def start(self, slot: SlotLease) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.ledger.begin(Shape(tuple(range(16)), 4, 2), [])

    def cross(self) -> None:
        self.crossed = True
        self.on_crossed(self)

    def fail(self, error: StagemeshError) -> None:
        if self.lost is None:
            self.lost = error
            self.on_lost(self, error)

    def probe(self) -> bool:
        self.probes += 1
        return True

    def retire(self) -> None:
        self.lost = StageLost("retired")

    def wake(self) -> None:
        pass

    async def stop(self) -> None:
        self.fail(StageLost("stopped"))

    async def close(self, *, last_words: bool = False) -> None:
        self.closed = True


class Mesh:
    """A driver, the loops that it made, a clock, and what it reported."""

    def __init__(self, refusal: StagemeshError | None = None, deadline_s: float = 60.0) -> None:
        self.now = 1000.0
        self.loops: list[FakeLoop] = []
        self.reporter = MagicMock()
        self.renewals = self.looks = 0
        self.refusal = refusal
        self.grants = True
        """The coordinator gives a fresh slot at once."""
        self.slot = SlotLease("g", self._renewed)
        self.slot.slot = 1
        settings: Any = SimpleNamespace(
            recovery_deadline=deadline_s, enable_prefix_caching=True, speculative_config=None
        )
        self.metrics = MagicMock()
        observers = Observers(self.metrics, MagicMock(), TIMING, lambda: self.now)

        async def no_model(_: types_pb2.PipelineView) -> None:
            return None

        self.driver = PipelineDriver(
            NAME,
            Surroundings(
                settings, self.slot, self.reporter, observers, deque(), no_model, self._looked,
                cast(Callable[..., BatchLoop], self._make_loop),
            ),
        )  # fmt: skip
        self.running: asyncio.Task[None] | None = None

    def _looked(self) -> None:
        self.looks += 1

    def _renewed(self) -> None:
        self.renewals += 1
        if self.grants:
            self.slot.slot = 1 + self.renewals

    def _make_loop(self, *args: Any) -> FakeLoop:
        loop = FakeLoop(*args)
        loop.refusal = self.refusal
        self.loops.append(loop)
        return loop

    def add(self) -> MagicMock:
        """A request that does not end by itself."""
        live = MagicMock(choices=[SimpleNamespace(finished=False, sequence=Sequence((1, 2), 0, 9))])
        live.fail.side_effect = lambda _: self.driver.forget(live)
        self.driver.accept(live)
        return live

    def run(self) -> None:
        self.running = asyncio.create_task(self.driver.run())

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not check():
                if self.running is not None and self.running.done():
                    self.running.result()
                await asyncio.sleep(0.001)

    async def serving(self, epoch: int = 4) -> FakeLoop:
        self.run()
        self.driver.follow(view("SERVING", epoch))
        await self.until(lambda: bool(self.loops))
        await self.until(lambda: self.driver.state is State.CROSSING)
        self.loops[-1].cross()
        await self.until(lambda: self.driver.state is State.SERVING)
        return self.loops[-1]

    async def end(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        self.driver.stop()
        await self.driver.close()


def test_every_state_is_left_by_a_loss_or_a_refusal_and_no_event_leads_two_ways() -> None:
    ways_out = {state for state, event in TRANSITIONS if event in (Event.LOST, Event.REFUSED, Event.WANTED)}
    assert ways_out == set(State)
    reached, todo = {State.WAITING}, [State.WAITING]
    while todo:
        at = todo.pop()
        for (state, _), then in TRANSITIONS.items():
            if state is at and then not in reached:
                reached.add(then)
                todo.append(then)
    assert reached == set(State)


def test_from_waiting_to_serving_to_lost_and_back() -> None:
    async def go() -> None:
        mesh = Mesh()
        first = await mesh.serving()
        assert mesh.driver.ready
        live, mesh.grants = mesh.add(), False
        first.fail(RanksDied("rank 0 of stage 1 was killed"))
        assert not mesh.driver.ready
        assert mesh.driver.recovering, "requests wait"
        await mesh.until(lambda: mesh.driver.state is State.WAITING)
        assert mesh.driver.reason == "rank 0 of stage 1 was killed"
        await mesh.until(lambda: first.closed)
        mesh.driver.follow(view("SERVING", 5))
        mesh.slot.slot = 2
        await mesh.until(lambda: mesh.driver.state is State.CROSSING and len(mesh.loops) > 1)
        mesh.loops[-1].cross()
        await mesh.until(lambda: mesh.driver.ready)
        assert not live.fail.called
        assert not mesh.driver.recovering
        await mesh.end()

    asyncio.run(go())


def test_a_bug_of_ours_ends_the_requests_and_the_next_epoch_begins_anew() -> None:
    async def go() -> None:
        mesh = Mesh()
        loop = await mesh.serving()
        before = mesh.driver.ledger
        loop.fail(InternalError("boom"))
        await mesh.until(lambda: len(mesh.loops) > 1)
        assert mesh.driver.ledger is not before
        await mesh.end()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("state", "waits_s"), [("DOWN", 0.0), ("FORMING", TIMING.patience_s), ("DRAINING", TIMING.finish_s)]
)
def test_what_it_runs_goes_on_elsewhere(state: str, waits_s: float) -> None:
    async def go() -> None:
        mesh = Mesh()
        await mesh.serving()
        live, driver = mesh.add(), mesh.driver
        assert not driver.gives_up
        driver.follow(view(state))
        assert driver.gives_up == (waits_s == 0.0)
        mesh.now += waits_s + 0.1
        assert driver.gives_up
        assert driver.hand_out("pipeline-0") == [live]
        assert not live.fail.called
        assert not driver.outage.open
        await mesh.end()

    asyncio.run(go())


def test_requests_of_a_pipeline_that_is_no_more_do_not_wait_for_ever() -> None:
    """Where no other one serves."""

    async def go() -> None:
        mesh = Mesh(deadline_s=0.05)
        await mesh.serving()
        live = mesh.add()
        mesh.driver.follow(None)
        await mesh.until(lambda: live.fail.called)
        (error,) = live.fail.call_args.args
        assert isinstance(error, StageLost)
        await mesh.end()

    asyncio.run(go())


def test_it_is_left_when_nothing_of_it_is_under_way() -> None:
    async def go() -> None:
        mesh = Mesh()
        await mesh.serving()
        live = mesh.add()
        mesh.driver.follow(view("DRAINING", leaving=True))
        await mesh.until(lambda: not mesh.driver.ready)
        assert not mesh.driver.left, "a request runs on it"
        mesh.driver.forget(live)
        await mesh.until(lambda: mesh.driver.left)
        assert mesh.driver.state is State.WAITING
        await mesh.until(lambda: mesh.reporter.left.called)
        # It looks again and again, and says so once after each word of the coordinator.
        looks = mesh.looks
        await mesh.until(lambda: mesh.looks > looks + 2)
        mesh.reporter.left.assert_called_once_with(NAME)
        mesh.driver.follow(view("DRAINING", leaving=True))
        await mesh.until(lambda: mesh.reporter.left.call_count == 2)
        await mesh.end()

    asyncio.run(go())


def test_an_epoch_before_one_that_was_driven_is_not_gone_back_to() -> None:
    async def go() -> None:
        mesh = Mesh()
        await mesh.serving(epoch=5)
        mesh.driver.follow(view("SERVING", epoch=4))
        await mesh.until(lambda: bool(mesh.reporter.moved.called))
        assert mesh.reporter.moved.call_args.args == (NAME, 5)
        assert mesh.driver.state is State.WAITING
        assert len(mesh.loops) == 1
        await mesh.end()

    asyncio.run(go())


def test_one_that_drives_nothing_says_at_once_that_it_is_at_the_next_epoch() -> None:
    async def go() -> None:
        mesh = Mesh()
        mesh.slot.slot = 0
        mesh.run()
        going = view("SERVING", epoch=4)
        going.next.epoch = 5
        mesh.driver.follow(going)
        await mesh.until(lambda: bool(mesh.reporter.moved.called))
        assert mesh.reporter.moved.call_args.args == (NAME, 5)
        await mesh.end()

    asyncio.run(go())


def test_sessions_that_cannot_be_opened_do_not_use_up_all_slots() -> None:
    async def go() -> None:
        mesh = Mesh(refusal=Unavailable("of 8 pages 0 are free"))
        mesh.run()
        mesh.driver.follow(view("SERVING"))
        await mesh.until(lambda: mesh.renewals == 1)
        for tries in (1, 2, 3):
            assert len(mesh.loops) == tries, "not again before some time has passed"
            mesh.now += TIMING.again_s - 0.01
            await asyncio.sleep(2 * TIMING.retry_s)
            assert len(mesh.loops) == tries
            mesh.now += 0.02
            await mesh.until(lambda tries=tries: len(mesh.loops) == tries + 1)  # type: ignore[misc]
        mesh.driver.follow(view("SERVING", epoch=5))
        before = len(mesh.loops)
        await mesh.until(lambda: len(mesh.loops) == before + 1)
        assert mesh.loops[-1].key == (NAME, 5), "another epoch is tried at once"
        await mesh.end()

    asyncio.run(go())


def test_the_coordinator_hears_of_a_worker_that_is_not_reached() -> None:
    async def go() -> None:
        mesh = Mesh(refusal=Unavailable("connection refused"))
        mesh.run()
        mesh.driver.follow(view("SERVING"))
        while not mesh.reporter.stuck.called:
            assert mesh.now < 1000 + 2 * TIMING.in_vain_s
            tries = len(mesh.loops)
            mesh.now += TIMING.again_s
            await mesh.until(lambda tries=tries: len(mesh.loops) > tries)  # type: ignore[misc]
            await mesh.until(lambda: mesh.driver.state is State.WAITING)
        assert mesh.now > 1000 + TIMING.in_vain_s
        name, epoch, reason, unreachable = mesh.reporter.stuck.call_args.args
        assert (name, epoch, list(unreachable)) == (NAME, 4, ["worker-b"])
        assert "worker-b cannot be reached" in reason
        await mesh.end()

    asyncio.run(go())
