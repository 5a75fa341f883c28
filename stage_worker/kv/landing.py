"""Pages that have come are put where they belong by a thread beside the engine's.

Memory that nobody has touched yet is made when it is, which can take the system a tenth of a second a frame: a stage
that serves must not wait for that, nor be taken for one that hangs. The thread asks for less of the processor.
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
"""Started when it is first needed. Jobs are few: links' credits bound them."""


def land(job: Callable[[], None]) -> Future[None]:
    """Begins a job behind those before, on the thread of this process."""
    return _thread.submit(job)
