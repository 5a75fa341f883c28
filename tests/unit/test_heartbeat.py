"""A rank that hangs is told from one that is at a long piece of work, or on a machine that stood still."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from unittest.mock import MagicMock

import pytest

from stagemesh.config import StageSettings
from stagemesh.stage_worker.agent.rank_group import RankGroup
from stagemesh.stage_worker.messages import heartbeat
from stagemesh.stage_worker.messages.heartbeat import (
    ALIVE_S,
    CALL_S,
    FIRST_S,
    MARGIN,
    ORDER_RESTS_S,
    RESTS_S,
    STOPPED_S,
    Doing,
    Heart,
    HeartWatch,
    Look,
    doing,
    make_heartbeats,
)
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.timing import StageTiming

EVERY_S = 0.1


class Clock:
    """Time that goes on when it is told to; a watch looks every tenth of a second meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hearts: tuple[int, ...] = (1,)) -> None:
        self.now = 1000.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        fd = make_heartbeats(2)
        self.watch = HeartWatch(fd, 2, EVERY_S)
        self.hearts = [Heart(os.dup(fd), rank, 2) for rank in hearts]
        self.heart = self.hearts[-1]
        os.close(fd)

    def overdue(self) -> list[tuple[int, float]]:
        """What a look says, while somebody runs."""
        return self.watch.look(lambda _: Doing.RUNS).overdue

    def hangs_after(self, most_s: float = 1000) -> float:
        """Seconds until the watch says that the rank hangs."""
        began = self.now
        while not (found := self.overdue()):
            assert self.now - began < most_s, "nothing is noticed"
            self.now += EVERY_S
        assert [rank for rank, _ in found] == [1]
        return self.now - began


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def step(clock: Clock, tokens: int, s_per_token: float, layers: int = 4) -> None:
    clock.heart.work(tokens)
    for _ in range(layers - 1):
        clock.now += s_per_token * tokens
        clock.heart.beat()
    clock.now += s_per_token * tokens
    clock.heart.rest()


def test_before_it_is_up_nothing_is_due(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="nothing is noticed"):
        clock.hangs_after(100)


def test_an_order_may_take_a_minute_between_two_signs_of_life(clock: Clock) -> None:
    clock.heart.call()
    with pytest.raises(AssertionError, match="nothing is noticed"):
        clock.hangs_after(CALL_S - 1)
    clock.heart.call()
    assert CALL_S - 1 < clock.hangs_after(2 * CALL_S) < CALL_S + 1


def test_an_idle_rank_is_missed_in_under_a_second(clock: Clock) -> None:
    clock.heart.beat()
    assert ALIVE_S < clock.hangs_after() < 1.0


@pytest.mark.parametrize(
    ("act", "allowed_s"),
    [
        (lambda c: c.heart.work(8), MARGIN * 8e-3),
        (lambda c: c.heart.work(15), MARGIN * 8e-3),
        (lambda c: c.heart.work(2048), MARGIN * 2.048),
        (lambda c: (c.heart.work(2048), c.heart.beat()), MARGIN * 2.048),
        (lambda c: (c.heart.work(2048), c.heart.rest()), 0),
    ],
)
def test_a_stretch_of_work_gets_what_such_stretches_took(
    clock: Clock, act: Callable[[Clock], object], allowed_s: float
) -> None:
    for _ in range(5):
        step(clock, 8, 1e-3)
    act(clock)
    allowed_s += ALIVE_S
    assert allowed_s * 0.97 < clock.hangs_after() < allowed_s + 3 * EVERY_S


def test_a_smaller_step_than_any_before_may_take_long(clock: Clock) -> None:
    step(clock, 100, 1e-4)
    clock.heart.work(1)
    assert FIRST_S < clock.hangs_after() < FIRST_S + 1


def test_what_was_slow_once_is_forgotten(clock: Clock) -> None:
    step(clock, 8, 1.0)
    for _ in range(20):
        step(clock, 8, 1e-3)
    clock.heart.work(8)
    assert clock.hangs_after() < 1.0


def test_a_watch_that_stood_still_itself_blames_nobody(clock: Clock) -> None:
    clock.heart.beat()
    assert not clock.overdue()
    for _ in range(10):
        clock.now += 5
        assert not clock.overdue()
    clock.heart.beat()
    clock.now += EVERY_S
    assert not clock.overdue()


def test_one_that_waits_for_another_is_told_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, hearts=(0, 1))
    for heart in clock.hearts:
        heart.beat()
    for _ in range(int(2 * ALIVE_S / EVERY_S)):
        clock.now += EVERY_S
        found = clock.overdue()
    assert [rank for rank, _ in found] == [0, 1]


def looks(
    clock: Clock, seconds: float, doing: Callable[[int], Doing], go_on: Callable[[], None] = lambda: None
) -> Look:
    """The last of the looks of so many seconds; the first one only begins."""
    clock.watch.look(doing)
    for _ in range(round(seconds / EVERY_S)):
        clock.now += EVERY_S
        go_on()
        told = clock.watch.look(doing)
    return told


def within_a_first_step(clock: Clock) -> None:
    for heart in clock.hearts:
        heart.work(1)


def within_an_order(clock: Clock) -> None:
    for heart in clock.hearts:
        heart.call()


@pytest.mark.parametrize(("act", "rests_s"), [(within_a_first_step, RESTS_S), (within_an_order, ORDER_RESTS_S)])
def test_a_group_none_of_which_runs_is_seen_whatever_time_it_has(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Clock], None], rests_s: float
) -> None:
    clock = Clock(monkeypatch, hearts=(0, 1))
    act(clock)
    assert not looks(clock, ALIVE_S + rests_s - EVERY_S, lambda _: Doing.WAITS).rests
    told = looks(clock, 3 * EVERY_S, lambda _: Doing.WAITS)
    assert told == Look([], [], rests=True)


def test_whoever_runs_or_writes_now_and_then_does_not_rest(clock: Clock) -> None:
    clock.heart.work(1)
    assert not looks(clock, 5, lambda rank: [Doing.WAITS, Doing.RUNS][rank]).rests
    turns = iter(range(1000))
    assert not looks(clock, 5, lambda _: Doing.RUNS if next(turns) % 10 == 9 else Doing.WAITS).rests
    assert looks(clock, 5, lambda _: Doing.STOPPED, clock.heart.call).stopped == [0]  # The other one writes.
    clock.now += 60
    assert clock.watch.look(lambda _: Doing.STOPPED) == Look([], [], rests=False)  # Nobody looked meanwhile.


@pytest.mark.parametrize("act", [within_a_first_step, within_an_order])
def test_a_stopped_rank_is_seen_though_the_others_run(clock: Clock, act: Callable[[Clock], None]) -> None:
    act(clock)
    told = looks(clock, ALIVE_S + STOPPED_S + 3 * EVERY_S, lambda rank: [Doing.RUNS, Doing.STOPPED][rank])
    assert told == Look([], [1], rests=False)


@pytest.mark.parametrize(
    ("code", "how", "expected"),
    [
        ("print(flush=True)\nwhile True: pass", None, Doing.RUNS),
        ("print(flush=True)\nwhile True: pass", signal.SIGSTOP, Doing.STOPPED),
        ("print(flush=True)\nimport time\ntime.sleep(60)", None, Doing.WAITS),
        (
            "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
            "print(flush=True)\nthreading.Event().wait()",
            None,
            Doing.RUNS,
        ),
    ],
    ids=["computes", "is stopped", "sleeps", "waits for a thread that computes"],
)
def test_what_a_process_does(code: str, how: signal.Signals | None, expected: Doing) -> None:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            if how is not None:
                process.send_signal(how)
            deadline = time.monotonic() + 10
            while doing(process.pid) is not expected:
                assert time.monotonic() < deadline
        finally:
            process.kill()
        deadline = time.monotonic() + 10
        while doing(process.pid) is not Doing.ENDED:
            assert time.monotonic() < deadline, "one that is dead is not known as such before somebody reaps it"
    assert doing(process.pid) is Doing.ENDED


class Process:
    """A rank that can be killed."""

    pid = 0
    killed = False

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("found", "writes", "killed"),
    [
        (Doing.WAITS, False, True),
        (Doing.STOPPED, False, True),
        (Doing.WAITS, True, False),
        (Doing.RUNS, False, False),
        (Doing.ENDED, False, False),
    ],
)
def test_who_is_overdue_is_killed_unless_he_goes_on_or_is_dead(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, found: Doing, writes: bool, killed: bool
) -> None:
    """He may have waited for a core, have it while it is looked at what he does, and wait again by then."""
    rank, looks, asked = Process(), 0, 0

    async def watch() -> None:
        configs = RankConfig.of_worker("stage test", StageSettings(), "cpu")
        group = RankGroup(configs, "nothing:run", lambda *frame: None, MagicMock(), StageTiming())
        group.processes = [Process(), rank]  # type: ignore[list-item]

        def what(asked_of: int) -> Doing:
            nonlocal asked
            asked += asked_of
            if writes and asked == 2:  # Once within a look, and again behind it, as he is overdue.
                clock.heart.beat()
            return found

        async def pass_on(_: float) -> None:
            nonlocal looks, asked
            looks, asked = looks + 1, 0
            clock.now += EVERY_S
            if looks == 8:
                group._lose("enough")

        monkeypatch.setattr(group, "_doing", what)
        monkeypatch.setattr("stagemesh.stage_worker.agent.rank_group.asyncio.sleep", pass_on)
        clock.heart.beat()
        await group._watch(clock.watch)

    asyncio.run(watch())
    assert rank.killed is killed
