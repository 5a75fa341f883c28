"""Writes pages that arrived into the KV cache, on a low-priority thread beside the engine's thread.

The system allocates memory at the first write, which can take a tenth of a second for one frame. The engine of a stage
that serves must not wait for that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

NICE = 10


def _give_way() -> None:
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


_thread = ThreadPoolExecutor(1, "landing", initializer=_give_way)
"""The executor. Its thread starts with the first job. The credits of the links bound the number of jobs."""


def land(job: Callable[[], None]) -> Future[None]:
    """Queues a job for the thread."""
    return _thread.submit(job)
