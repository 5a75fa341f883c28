"""Children as the launcher starts them: forked or as new interpreters, they are children of this process alike."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mesh import serve

from stagemesh.errors import ConfigError, Unavailable
from stagemesh.processes.child import ChildProcess
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.protos.v1.processes_pb2 import Call

DEADLINE_S = 30.0
HERE = {"PYTHONPATH": str(Path(__file__).parent)}
TIMING = LaunchTiming()


def call(function: str, argument: str = "0") -> Call:
    return Call(function=f"launched:{function}", argument=argument.encode())


@contextlib.asynccontextmanager
async def launching(imports: Call | None, timing: LaunchTiming = TIMING, **more: Any) -> AsyncIterator[Launcher]:
    """A launcher; nothing of it is left behind."""
    launcher = Launcher("test", timing, imports=imports, env=HERE, **more)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield launcher
    finally:
        launcher.stop()
    assert not psutil.Process().children(), "whoever starts a process reaps it"


async def told(launcher: Launcher, argument: str = "x") -> tuple[ChildProcess, dict[str, Any]]:
    """A child that says what it is, and that; it has ended."""
    read_fd, write_fd = os.pipe()
    try:
        child = await launcher.start("launched:tell", argument.encode(), [write_fd])
    finally:
        os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        said = json.loads(await asyncio.to_thread(pipe.read))
    assert child.wait(DEADLINE_S) == child.returncode == 7
    return child, said


@pytest.mark.parametrize("own_groups", [False, True])
@pytest.mark.parametrize("imports", [None, call("use_cpu")], ids=["spawned", "forked"])
def test_a_child_is_one_of_this_process_however_it_was_started(imports: Call | None, own_groups: bool) -> None:
    async def story() -> None:
        async with launching(imports, own_groups=own_groups) as launcher:
            for argument in ("1", "2"):
                _, said = await told(launcher, argument)
                assert said["argument"] == argument
                assert said["parent"] == os.getpid()
                assert said["group"] is own_groups, "who has a group of its own gets no Ctrl-C"
                assert said["session"] == os.getsid(0), "between sessions nice values count for nothing"
                assert said["imported"] == (0 if imports is None else 1)
                launcher.reap()

    asyncio.run(story())


@pytest.mark.parametrize("imports", [None, call("use_cpu")], ids=["spawned", "forked"])
def test_how_a_child_ended_is_known(imports: Call | None) -> None:
    async def story() -> None:
        async with launching(imports) as launcher:
            ended = await launcher.start("launched:fail", b"3", [])
            assert ended.wait(DEADLINE_S) == ended.poll() == 3
            killed = await launcher.start("launched:wait", b"60", [])
            assert killed.poll() is None
            assert killed.wait(0.01) is None
            killed.send_signal(signal.SIGTERM)
            assert killed.wait(DEADLINE_S) == -signal.SIGTERM
            killed.kill()
            for unknown in ("launched:nothing", "nothing:at_all"):
                assert (await launcher.start(unknown, b"", [])).wait(DEADLINE_S) == 1

    asyncio.run(story())


def test_children_go_on_without_their_forkserver_and_another_takes_its_place(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with launching(call("use_cpu")) as launcher:
            child = await launcher.start("launched:wait", b"60", [])
            assert launcher.forkserver is not None
            first = launcher.forkserver.pid
            os.kill(first, signal.SIGKILL)
            while launcher.forkserver is None or launcher.forkserver.pid == first:
                launcher.reap()
                await asyncio.sleep(0.01)
            assert child.poll() is None
            _, said = await told(launcher)
            assert said["imported"] == 1
            child.kill()
            child.wait(DEADLINE_S)

    asyncio.run(story())
    assert caplog.text.count("the test forkserver is gone: it was killed by SIGKILL") == 1


def test_a_forkserver_that_does_nothing_is_given_up() -> None:
    async def story() -> None:
        async with launching(call("use_cpu"), LaunchTiming(idle_s=0.3)) as launcher:
            await told(launcher)
            hangs = launcher.forkserver
            assert hangs is not None
            hangs.send_signal(signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(Unavailable, match="forked no child, and does not go on"):
                await launcher.start("launched:wait", b"60", [])
            assert 0.3 < time.monotonic() - began < 5
            assert hangs.returncode == -signal.SIGKILL
            await told(launcher)

    asyncio.run(story())


def test_imports_that_fail_are_not_tried_again_and_again() -> None:
    async def story() -> None:
        async with launching(call("fail", "3")) as launcher:
            with pytest.raises(ConfigError, match="can fork nothing: see what was said above"):
                await launcher.start("launched:wait", b"60", [])

    asyncio.run(story())


@contextlib.contextmanager
def a_crowded_core(count: int) -> Iterator[None]:
    """This process and its children have one core, which so many others keep busy."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()
        os.sched_setaffinity(0, cores)


def test_an_import_may_take_as_long_as_others_have_the_cores() -> None:
    """A start on a starved machine goes on; it is not begun anew each time that the time is up."""

    async def story() -> None:
        timing = LaunchTiming(import_s=1.5, idle_s=1.0)
        with a_crowded_core(5):
            began = time.monotonic()
            launcher = Launcher("test", timing, imports=call("use_cpu", "1.0"), env=HERE)
            try:
                child = await launcher.start("launched:fail", b"0", [])
                took_s = time.monotonic() - began
                assert child.wait(DEADLINE_S) == 0
            finally:
                launcher.stop()
        print(f"a second of a core took {took_s:.1f} s, where {timing.import_s} s are allowed")
        assert took_s > 2 * timing.import_s

    asyncio.run(story())


def test_an_import_that_never_ends_is_given_up() -> None:
    async def story() -> None:
        async with launching(call("use_cpu", "60"), LaunchTiming(import_s=0.6, idle_s=0.3)) as launcher:
            with pytest.raises(Unavailable, match="does not go on"):
                await launcher.start("launched:wait", b"60", [])

    asyncio.run(story())


# -- a safe path -------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A folder with modules of the names of ours, of a library's and of Python's own, which tell when they are run."""
    code = f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__ + chr(10)); raise SystemExit(99)\n"
    folder = tmp_path / "clone"
    for name in ("stagemesh/__init__.py", "stagemesh/cli/__init__.py", "torch.py", "json.py", "grpc/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    return folder


@pytest.mark.parametrize("imports", [None, call("use_cpu")], ids=["spawned", "forked"])
def test_a_child_imports_nothing_from_the_folder_it_is_started_in(
    poisoned: Path, imports: Call | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(poisoned)

    async def story() -> None:
        async with launching(imports) as launcher:
            _, said = await told(launcher)
            assert not {"", ".", str(poisoned)} & set(said["path"])

    asyncio.run(story())
    assert not (poisoned.parent / "imported").exists()


def test_serve_runs_its_own_code_in_a_folder_that_holds_a_clone(poisoned: Path) -> None:
    """Coordinator, gateway, workers and ranks: as an installed `stagemesh` is typed into a shell."""
    installed = Path(sys.executable).with_name("stagemesh")
    with serve("-pp", "1", command=[str(installed)], cwd=poisoned) as mesh:
        assert len(mesh.greedy([5, 6, 7], 4)) == 4
    assert not (poisoned.parent / "imported").exists()
