"""The common start of every process of the mesh: title, end with the parent, priority, log."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import setproctitle

from stagemesh.processes.messages import Kind, pack_message
from stagemesh.protos.v1.processes_pb2 import Listening

PR_SET_PDEATHSIG = 1
log = logging.getLogger(__name__)

PREFERRED_NICE = -10


def set_title(title: str) -> None:
    """Names the process in ps and top: `stagemesh stage 1 layers 6-11 rank 0`."""
    setproctitle.setproctitle(f"stagemesh {title}")


def die_with_parent(parent_pid: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """Makes the kernel send `sig` when the parent dies, so that no orphan remains. Exits if the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def prefer() -> None:
    """Raises the priority of this process, if allowed. Processes that keep leases call it."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PREFERRED_NICE)


def boot_id() -> str:
    """Returns an id of this host's boot. Processes with the same id share a monotonic clock. Empty if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def set_up_logging(role: str) -> None:
    """Logs one line per record to stderr, with the role before the logger's name."""
    logging.basicConfig(
        level=os.environ.get("STAGEMESH_LOG_LEVEL", "INFO").upper(),
        format=f"%(asctime)s.%(msecs)03d %(levelname).1s {role} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def tell_ready(ready_fd: int | None, **ports: int) -> None:
    """Tells the parent on which ports this service listens, and closes the descriptor."""
    if ready_fd is not None:
        with os.fdopen(ready_fd, "wb") as pipe:
            pipe.write(pack_message(Kind.LISTENING, Listening(ports=ports)))


def run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Runs a child process's function, and ends the process with the status that it returns.

    The interpreter's teardown is skipped. It has nothing useful to do, it can hang on threads of torch, gloo and UCX,
    and in a fork it would run the parent's.
    """
    code = 1
    try:
        code = run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except Exception:
        log.exception("this process ends")
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
