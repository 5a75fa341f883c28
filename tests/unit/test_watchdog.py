"""A rank that hangs is told from one that is at a long piece of work, or on a machine that gives it no core."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from stagemesh.errors import ConfigError, InternalError
from stagemesh.processes.cpu import CpuMeter, CpuUse, Patience
from stagemesh.stage_worker.agent.watchdog import Hang, Watchdog
from stagemesh.stage_worker.messages.control import Kind
from stagemesh.stage_worker.messages.heartbeat import HEADER, Activity, Beat, Heartbeats, make_heartbeats
from stagemesh.stage_worker.rank.heartbeat import MARGIN, Heartbeat
from stagemesh.stage_worker.timing import StageTiming

TIMING = StageTiming()
EVERY_S = TIMING.look_s
COMPUTES, STARVES, WAITS = CpuUse(ran_s=EVERY_S), CpuUse(starved_s=EVERY_S), CpuUse()
ON_DISK, STOPPED, ENDED = CpuUse(on_disk=True), CpuUse(stopped=True), CpuUse(ended=True)


@dataclass
class Process:
    """What a rank's process does."""

    use: CpuUse = COMPUTES
    then: Callable[[], object] | None = None
    """Done as it is looked at."""

    def read(self, passed_s: float) -> CpuUse:
        if self.then is not None:
            self.then()
        return self.use


@dataclass
class Group:
    """Two ranks and their watchdog; time goes on when it is told to."""

    cuda: bool = False
    now: float = 1000.0
    processes: tuple[Process, Process] = field(default_factory=lambda: (Process(), Process()))

    def __post_init__(self) -> None:
        fd = make_heartbeats(2)
        self.memory = Heartbeats(fd, 2)
        self.watchdog = Watchdog(self.memory, self.processes, TIMING, cuda=self.cuda, clock=lambda: self.now)
        self.ranks = [Heartbeat(self.memory, rank, TIMING, cuda=self.cuda, clock=lambda: self.now) for rank in range(2)]
        self.rank = self.ranks[1]

    def do(self, *uses: CpuUse) -> None:
        """From now on; one for both, or one each."""
        for process, use in zip(self.processes, itertools.cycle(uses), strict=False):
            process.use = use

    def look(self, after_s: float = EVERY_S) -> Hang | None:
        self.now += after_s
        return self.watchdog.look()

    def hangs_after(self, most_s: float = 1000, *, go_on: Callable[[], object] = lambda: None) -> float:
        """Seconds until a rank hangs."""
        began = self.now
        while self.look() is None:
            assert self.now - began < most_s, "nothing is noticed"
            go_on()
        return self.now - began

    def never_hangs(self, for_s: float = 100, *, go_on: Callable[[], object] = lambda: None) -> None:
        with pytest.raises(AssertionError, match="nothing is noticed"):
            self.hangs_after(for_s, go_on=go_on)


@pytest.fixture
def group() -> Group:
    """Whose rank 0 has an hour, so that what is noticed is of rank 1."""
    made = Group()
    made.memory.write(0, Beat(Activity.IDLE, 0, made.now, 3600.0))
    made.do(COMPUTES, WAITS)
    return made


def step(group: Group, tokens: int, s_per_token: float, layers: int = 4) -> None:
    group.rank.begin_step(tokens)
    for _ in range(layers - 1):
        group.now += s_per_token * tokens
        group.rank.alive()
    group.now += s_per_token * tokens
    group.rank.end_step()


def test_before_it_is_up_nothing_is_due(group: Group) -> None:
    group.never_hangs()


def test_an_order_may_take_a_minute_between_two_signs_of_life(group: Group) -> None:
    group.rank.order(Kind.ASSIGN)
    group.never_hangs(TIMING.order_sign_s - 1)
    group.rank.load()
    assert TIMING.order_sign_s - 1 < group.hangs_after(2 * TIMING.order_sign_s) < TIMING.order_sign_s + 1


def test_an_idle_rank_is_missed_in_under_a_second(group: Group) -> None:
    group.rank.alive()
    assert TIMING.alive_s < group.hangs_after() < 0.7


@pytest.mark.parametrize(
    ("act", "allowed_s"),
    [
        (lambda g: g.rank.begin_step(8), MARGIN * 8e-3),
        (lambda g: g.rank.begin_step(15), MARGIN * 8e-3),
        (lambda g: g.rank.begin_step(2048), MARGIN * 2.048),
        (lambda g: (g.rank.begin_step(2048), g.rank.alive()), MARGIN * 2.048),
        (lambda g: (g.rank.begin_step(2048), g.rank.end_step()), 0),
    ],
)
def test_a_stretch_of_work_gets_what_such_stretches_took(
    group: Group, act: Callable[[Group], object], allowed_s: float
) -> None:
    for _ in range(5):
        step(group, 8, 1e-3)
    act(group)
    allowed_s += TIMING.alive_s
    assert allowed_s * 0.97 < group.hangs_after() < allowed_s + 3 * EVERY_S


def test_a_smaller_step_than_any_before_may_take_long(group: Group) -> None:
    step(group, 100, 1e-4)
    group.rank.begin_step(1)
    assert TIMING.first_step_s < group.hangs_after() < TIMING.first_step_s + 1


def test_what_was_slow_once_is_forgotten(group: Group) -> None:
    step(group, 8, 1.0)
    for _ in range(20):
        step(group, 8, 1e-3)
    group.rank.begin_step(8)
    assert group.hangs_after() < 1.0


def test_a_load_beside_steps_may_keep_a_rank_from_them_for_a_while(group: Group) -> None:
    group.rank.loads = True
    group.rank.alive()
    assert TIMING.beside_load_s < group.hangs_after() - TIMING.alive_s < TIMING.beside_load_s + 2 * EVERY_S


# -- nobody is blamed for what the host does --------------------------------------------------------------------------


def test_time_without_a_core_does_not_count(group: Group) -> None:
    group.rank.alive()
    group.do(WAITS, STARVES)
    group.never_hangs(60)
    group.do(WAITS, WAITS)
    assert group.hangs_after() < 1.0


def test_one_that_waits_for_another_which_has_no_core_is_not_late(group: Group) -> None:
    group.rank.begin_step(8)
    group.rank.end_step()
    group.rank.begin_step(8)
    group.do(STARVES, WAITS)
    group.never_hangs(60)


def test_it_is_late_by_what_is_left_when_it_had_a_core_for_half_of_the_time(group: Group) -> None:
    group.rank.order(Kind.ASSIGN)
    group.do(WAITS, CpuUse(ran_s=EVERY_S / 2, starved_s=EVERY_S / 2))
    took_s = group.hangs_after()
    assert 2 * (TIMING.order_sign_s + TIMING.late_s) < took_s + 2 < 2 * (TIMING.order_sign_s + TIMING.late_s) + 4


def test_a_watchdog_that_was_not_run_itself_counts_one_look(group: Group) -> None:
    group.rank.alive()
    assert group.look() is None
    assert all(group.look(after_s=5) is None for _ in range(3))
    assert group.hangs_after() < 0.4
    group.rank.alive()
    assert group.look() is None


def test_who_is_late_and_runs_is_slow_for_a_while(group: Group) -> None:
    group.rank.alive()
    group.do(WAITS, COMPUTES)
    assert TIMING.late_s < group.hangs_after() - TIMING.alive_s < TIMING.late_s + 3 * EVERY_S
    group.rank.alive()
    group.do(WAITS, ON_DISK)
    assert TIMING.late_s < group.hangs_after()


def test_who_writes_as_it_is_looked_at_goes_on(group: Group) -> None:
    """He may have waited for a core, have it while it is looked at what he does, and wait again by then."""
    group.rank.alive()
    group.processes[1].then = group.rank.alive
    group.never_hangs(60)


def test_who_is_dead_does_not_hang(group: Group) -> None:
    group.rank.alive()
    group.do(WAITS, ENDED)
    group.never_hangs(60)


# -- whatever time it has ---------------------------------------------------------------------------------------------


def within_a_first_step(group: Group) -> None:
    for rank in group.ranks:
        rank.begin_step(1)


def within_an_order(group: Group) -> None:
    for rank in group.ranks:
        rank.order(Kind.PREPARE)


def before_they_are_up(group: Group) -> None:
    pass


@pytest.mark.parametrize(
    ("act", "rests_s"),
    [
        (within_a_first_step, TIMING.stuck_s),
        (within_an_order, TIMING.order_stuck_s),
        (before_they_are_up, TIMING.order_stuck_s),
    ],
)
def test_a_group_none_of_which_runs_is_seen_whatever_time_it_has(act: Callable[[Group], None], rests_s: float) -> None:
    group = Group()
    act(group)
    group.do(WAITS)
    assert -2 * EVERY_S < group.hangs_after() - TIMING.alive_s - rests_s < 3 * EVERY_S


def test_threads_that_wake_now_and_then_are_no_work() -> None:
    group = Group()
    within_a_first_step(group)
    group.do(CpuUse(ran_s=EVERY_S / 100))
    assert group.hangs_after() < 2.0


@pytest.mark.parametrize("use", [COMPUTES, STARVES, ON_DISK])
def test_whoever_runs_now_and_then_does_not_rest(use: CpuUse) -> None:
    group = Group()
    within_a_first_step(group)
    group.do(use, WAITS)
    group.never_hangs(20)
    turns = itertools.count()
    group.do(WAITS)
    group.never_hangs(5, go_on=lambda: group.do(WAITS, use if next(turns) % 5 == 4 else WAITS))


def test_on_cuda_devices_nobody_can_tell_whether_a_group_runs() -> None:
    group = Group(cuda=True)
    within_a_first_step(group)
    group.do(WAITS)
    assert group.hangs_after() > TIMING.first_step_s + TIMING.cuda_step_s


@pytest.mark.parametrize("act", [within_a_first_step, within_an_order])
def test_a_stopped_rank_is_seen_though_the_others_run(act: Callable[[Group], None]) -> None:
    group = Group()
    act(group)
    group.do(COMPUTES, STOPPED)
    while (found := group.look()) is None:
        assert group.now < 1000 + TIMING.alive_s + TIMING.stuck_s + 3 * EVERY_S
    assert found.rank == 1
    assert "it is stopped" in found.why


def test_what_a_rank_is_at_is_told_when_it_hangs(group: Group) -> None:
    for act, told in (
        (lambda: group.rank.begin_step(5), "in a step of 5 tokens"),
        (lambda: group.rank.order(Kind.CONNECT_LINK), "at the order CONNECT_LINK"),
    ):
        act()
        group.do(COMPUTES, STOPPED)
        while (found := group.look()) is None:
            pass
        assert found == Hang(1, f"it is stopped ({told})")


# -- the memory -------------------------------------------------------------------------------------------------------


def test_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(InternalError, match="heartbeats of 3 ranks do not lie in"):
        Heartbeats(make_heartbeats(2), 3)
    fd = make_heartbeats(2)
    os.pwrite(fd, HEADER.pack(b"SMHB", 9, 2), 0)
    with pytest.raises(InternalError, match=r"no heartbeats of version 1 and 2 ranks: .*9"):
        Heartbeats(fd, 2)


def test_times_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="an idle rank writes in time"):
        StageTiming(idle_s=0.5)
    assert StageTiming().scaled(3.0).alive_s == pytest.approx(1.2)


# -- what the kernel says ---------------------------------------------------------------------------------------------

BUSY = "print(flush=True)\nwhile True: pass"


def use_of(meter: CpuMeter, holds: Callable[[CpuUse], bool]) -> None:
    """Until it holds of a tenth of a second."""
    deadline = time.monotonic() + 20
    meter.read(0)
    while True:
        began = time.monotonic()
        time.sleep(EVERY_S)
        if holds(found := meter.read(time.monotonic() - began)):
            return
        assert time.monotonic() < deadline, found


@pytest.mark.parametrize(
    ("code", "how", "holds"),
    [
        (BUSY, None, lambda use: use.ran_s > 0.01),
        (BUSY, signal.SIGSTOP, lambda use: use == CpuUse(stopped=True)),
        ("print(flush=True)\nimport time\ntime.sleep(60)", None, lambda use: use == CpuUse()),
        (
            "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start()\n"
            "print(flush=True)\nthreading.Event().wait()",
            None,
            lambda use: use.ran_s > 0.01,
        ),
    ],
    ids=["computes", "is stopped", "sleeps", "waits for a thread that computes"],
)
def test_what_a_process_does(code: str, how: signal.Signals | None, holds: Callable[[CpuUse], bool]) -> None:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        meter = CpuMeter(process.pid)
        try:
            process.stdout.readline()
            if how is not None:
                process.send_signal(how)
            use_of(meter, holds)
        finally:
            process.kill()
        use_of(meter, lambda use: use.ended)  # Before somebody reaps it, too.
    assert meter.read(1.0).ended


def test_of_processes_that_share_a_core_each_is_known_to_wait_for_it() -> None:
    core = {min(os.sched_getaffinity(0))}
    processes = [subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
            os.sched_setaffinity(process.pid, core)
        # A third of the time each, if nobody else is there: less of it to run, more to wait.
        for process in processes:
            use_of(CpuMeter(process.pid), lambda use: use.ran_s > 0 and use.starved_s > use.ran_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_patience_is_for_time_with_a_core_and_ends_with_a_process_that_does_nothing() -> None:
    now = 0.0
    code = "print(flush=True)\nimport time\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            use_of(CpuMeter(process.pid), lambda use: use == CpuUse())
            patience = Patience(process.pid, total_s=1.0, idle_s=0.3, look_s=0.1, clock=lambda: now)
            assert not patience.over()
            now += 60  # Nobody looked: it counts as two looks.
            assert not patience.over()
            now += 0.15
            assert patience.over()
        finally:
            process.kill()
