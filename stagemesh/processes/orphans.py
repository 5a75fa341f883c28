"""Orphans: on Linux, a process whose parent has ended becomes a child of the nearest ancestor that adopts orphans."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(adopt: bool = True) -> None:
    """Sets whether this process adopts its descendants' orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def reap_orphans(own: Collection[int], *, kill: bool = False) -> None:
    """Reaps children of this process that are not in `own`. `kill`: kills them first, and waits for their end."""
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
