"""Pages that have come are put where they belong by a thread beside the engine's.

Memory that nobody has touched yet is made when it is, which can take the system a tenth of a second a frame: a stage
that serves must not wait for that, nor be taken for one that hangs. The thread asks for less of the processor.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

NICE = 10


class Landing:
    """A thread for one rank, started when it is first needed. Jobs are few: links' credits bound them."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> threading.Event:
        """Begins a job behind those before; what is returned is set when it is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="landing", daemon=True)
            self._thread.start()
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            job, done = self._jobs.get()
            job()
            done.set()


_landing = Landing()


def land(job: Callable[[], None]) -> threading.Event:
    """On the thread of this process."""
    return _landing.start(job)
