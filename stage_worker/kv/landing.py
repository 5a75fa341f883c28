"""Pages that have come are put where they belong by a thread beside the engine's.

Memory that nobody has touched yet is made when it is, which can take the system a tenth of a second a frame: a stage
that serves must not wait for that, nor be taken for one that hangs. The thread asks for less of the processor.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

NICE = 10


@dataclass
class Landed:
    """A job; `done` is set when it is over, well or not."""

    job: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Landing:
    """A thread for one rank, started when it is first needed. Jobs are few: links' credits bound them."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Landed] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], None]) -> Landed:
        """Begins a job behind those before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="landing", daemon=True)
            self._thread.start()
        landed = Landed(job)
        self._jobs.put(landed)
        return landed

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            landed = self._jobs.get()
            try:
                landed.job()
            except BaseException as e:  # noqa: BLE001 - told by the engine's thread
                landed.error = e
            finally:
                landed.done.set()


_landing = Landing()


def land(job: Callable[[], None]) -> Landed:
    """On the thread of this process."""
    return _landing.start(job)
