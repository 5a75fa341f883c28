"""What children of the launcher's tests run. Each function takes an argument and descriptors, as any such call."""

from __future__ import annotations

import json
import os
import sys
import time

imported = 0
"""Calls of `use_cpu` in this process, or the one that it was forked from."""


def use_cpu(argument: bytes, fds: list[int]) -> int:
    """Computes for so many seconds of a core, as importing does."""
    global imported
    imported += 1
    while time.process_time() < float(argument):
        pass
    return 0


def fail(argument: bytes, fds: list[int]) -> int:
    """Ends with this status."""
    return int(argument)


def wait(argument: bytes, fds: list[int]) -> int:
    """Runs until it is ended."""
    time.sleep(float(argument))
    return 0


def tell(argument: bytes, fds: list[int]) -> int:
    """Says what this process is, to the first descriptor."""
    import torch  # noqa: F401 - a library that is imported late is found where it belongs, too

    what = {
        "argument": argument.decode(),
        "imported": imported,
        "parent": os.getppid(),
        "group": os.getpgid(0) == os.getpid(),
        "session": os.getsid(0),
        "path": sys.path,
        "threads": len(os.listdir("/proc/self/task")),
    }
    with os.fdopen(fds[0], "w") as pipe:
        json.dump(what, pipe)
    return 7
