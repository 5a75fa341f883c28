"""What every process of the mesh does at its start: a title, a parent that it does not outlive, a log."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

import setproctitle

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
log = logging.getLogger(__name__)

PREFERRED_NICE = -10

_nice_before: int | None = None
"""The priority of this process before it was preferred."""


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
    global _nice_before
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PREFERRED_NICE)
        _nice_before = nice


def not_prefer(pid: int) -> None:
    """Has a child that was just started go on as this process did before `prefer`, if anything came of that."""
    if _nice_before is not None:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, _nice_before)


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


def run_and_exit(run: Callable[[], int], ends: str) -> NoReturn:
    """Runs what a process is for, and ends it with the status that this returns; `ends` is logged with an error.

    The interpreter's own teardown is left out: of torch, gloo and UCX threads it has no work left that matters and can
    hang, and in a fork it would carry out the parent's.
    """
    code = 1
    try:
        code = run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except Exception:
        log.exception(ends)
    finally:
        logging.shutdown()
        os._exit(code)
