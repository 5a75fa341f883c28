"""Loading beside serving: the weights of a layer range come into memory on a thread, while the engine's runs steps.

Where this rank serves nothing, the thread asks for less of the processor than other ranks' steps do. Where it serves,
it does not: put aside for those, it would keep the interpreter's lock from this rank's own steps. What it loads is the
engine's when it is done.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from stagemesh.errors import Unavailable
from stagemesh.protos.v1 import stage_pb2

from ...model.choose import Shard
from .rank_memory import RankMemory

NICE = 10


class Preparing:
    """At most one at a time. `done(ident, outcome)` is called on the engine's thread."""

    def __init__(
        self,
        memory: RankMemory,
        tell: Callable[[int, int, int], None],
        done: Callable[[int, stage_pb2.PrepareRequest, list[Shard] | BaseException], None],
        sign_s: float,
    ) -> None:
        """`sign_s`: how often progress is told while all wait for a load (`join`)."""
        self._memory, self._tell, self._done, self._sign_s = memory, tell, done, sign_s
        self._thread: threading.Thread | None = None
        self._ident = 0
        self._request = stage_pb2.PrepareRequest()
        self._progress: tuple[int, int] | None = None
        self._outcome: list[Shard] | BaseException | None = None

    def start(self, ident: int, request: stage_pb2.PrepareRequest, *, serves: bool) -> None:
        """Begins; `serves`: steps run meanwhile. Raises Unavailable while another one is under way."""
        if self._thread is not None:
            raise Unavailable("another range is being loaded", retry_after_s=1)
        self._ident, self._request = ident, request
        self._progress = self._outcome = None
        self._thread = threading.Thread(target=self._load, args=(serves,), name="prepare", daemon=True)
        self._thread.start()

    def _load(self, serves: bool) -> None:
        try:
            if not serves:
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
            self._outcome = self._memory.load(self._request, self._note)
        except BaseException as e:  # noqa: BLE001 - told by the engine's thread
            self._outcome = e

    def _note(self, done: int, total: int) -> None:
        self._progress = done, total

    def poll(self) -> bool:
        """Tells what there is to tell, on the engine's thread; True when there was something."""
        thread = self._thread
        if thread is None:
            return False
        if thread.is_alive():
            progress, self._progress = self._progress, None
            if progress is not None:
                self._tell(self._ident, *progress)
            return progress is not None
        self._thread = None
        assert self._outcome is not None
        outcome, self._outcome = self._outcome, None
        self._done(self._ident, self._request, outcome)
        return True

    def join(self) -> None:
        """Waits for what is under way: an order came that needs the memory now."""
        if self._thread is not None:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, self._thread.native_id or 0, 0)
            while self._thread is not None:
                self._thread.join(self._sign_s)
                self.poll()
