"""What every process of the mesh does at its start: a title, a parent that it does not outlive, a log."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

import setproctitle

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PREFERRED_NICE, STARTING_NICE = -10, 10
SESSION_RATE_S = 0.11

BEHIND_S = 2.0
"""How long a process that is started again stands back: as long as a successor is refilled, as a rule."""

_before: tuple[int, float] | None = None
"""The priority of this process before it was preferred, and when."""


def set_title(title: str) -> None:
    """Names the process in ps and top: `stagemesh stage 1 layers 6-11 rank 0`."""
    setproctitle.setproctitle(f"stagemesh {title}")


def die_with_parent(parent_pid: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send `sig` when the parent dies, so that no orphan is left; exits if it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def prefer() -> None:
    """Asks to be scheduled before compute: for processes that keep leases. Goes without where that is not allowed."""
    global _before
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PREFERRED_NICE)
        _before = nice, time.monotonic()


def not_prefer(pid: int) -> None:
    """Has a child that was just started go on as this process did before `prefer`, if anything came of that."""
    if _before is not None:
        nice, at = _before
        # It may be time to come forward already, or be past it.
        over = nice == STARTING_NICE and (session_nice(pid) == 0 or time.monotonic() > at + BEHIND_S)
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, 0 if over else nice)


def _may_prefer() -> bool:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice - 1)
    except PermissionError:
        return False
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    return True


def stand_back(pid: int) -> None:
    """Has a child that was just started import behind those that compute, until it calls `prefer`, and its children
    until they call `not_preferred`. Where this process may not prefer any, they could not undo it."""
    if _may_prefer():
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, STARTING_NICE)
        _nice_session(pid, STARTING_NICE)


def come_forward(pid: int) -> None:
    """Undoes `stand_back` for a child, its session, and what it has started itself."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            _undo(each)
    if session_nice(pid) == STARTING_NICE:
        _nice_session(pid, 0)


def not_preferred() -> None:
    """Undoes `prefer` and `stand_back` in a child that computes, for all of its threads and for its session."""
    _undo(os.getpid(), PREFERRED_NICE)
    if session_nice(os.getpid()) == STARTING_NICE:
        _nice_session(os.getpid(), 0)


def _undo(pid: int, *also: int) -> None:
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpriority(os.PRIO_PROCESS, thread) in (STARTING_NICE, *also):
                os.setpriority(os.PRIO_PROCESS, thread, 0)


def session_nice(pid: int) -> int | None:
    """Where Linux schedules sessions (`autogroup`), a process's priority counts within its session alone, and this is
    the session's among the others. None elsewhere."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().rpartition(" nice ")[2])
    except (OSError, ValueError):
        return None


def _nice_session(pid: int, nice: int) -> None:
    for _ in range(2):
        try:
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))
        except BlockingIOError:
            time.sleep(SESSION_RATE_S)  # The kernel takes one such change in this time from all of us.
        except OSError:
            return  # It has ended, or sessions are not scheduled here.
        else:
            return


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that they are reaped here (and not by nobody)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own: Collection[int], *, kill: bool = False) -> None:
    """Reaps children of this process that it did not start itself; kills them first when asked to."""
    if sys.platform != "linux":
        return
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        adopted = [pid for pid in map(int, f.read().split()) if pid not in own]
    for pid in adopted:
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0 if kill else os.WNOHANG)


def boot_id() -> str:
    """Tells hosts apart: processes with the same one share a monotonic clock. Empty where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def set_up_logging(role: str) -> None:
    """One line a record on stderr, with the role in front."""
    logging.basicConfig(
        level=os.environ.get("STAGEMESH_LOG_LEVEL", "INFO").upper(),
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {role} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def tell_ready(ready_fd: int | None, **said: object) -> None:
    """Writes one JSON line (ports that were asked of the system) for the parent and closes the descriptor."""
    if ready_fd is not None:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(json.dumps(said) + "\n")
