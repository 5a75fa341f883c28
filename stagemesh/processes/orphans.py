"""Orphans: processes whose own parent has ended become children of the nearest ancestor that adopts them (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(adopt: bool = True) -> None:
    """Has this process adopt its descendants' orphans, or no longer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def reap_orphans(own: Collection[int], *, kill: bool = False) -> None:
    """Reaps children of this process but for its `own`; kills them first when asked to, and waits for their end."""
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
