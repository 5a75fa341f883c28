"""Loads the weights of a layer range on a separate thread, while the engine's thread runs steps.

If this rank serves nothing, the thread has a lower priority than the steps of other ranks. If this rank serves, the
thread has normal priority: at a low one, it would hold the interpreter's lock for long and delay this rank's own steps.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

from stagemesh.errors import Unavailable
from stagemesh.protos.v1 import stage_pb2

from ...model.choose import Shard
from .rank_memory import RankMemory

NICE = 10


class Preparing:
    """Runs one load at a time. It calls `tell` and `done` on the engine's thread."""

    def __init__(
        self,
        memory: RankMemory,
        tell: Callable[[int, int, int], None],
        done: Callable[[int, stage_pb2.PrepareRequest, Future[list[Shard]]], None],
        sign_s: float,
    ) -> None:
        """`sign_s`: interval at which `join` reports progress, in seconds."""
        self._memory, self._tell, self._done, self._sign_s = memory, tell, done, sign_s
        self._thread: threading.Thread | None = None
        self._ident = 0
        self._request = stage_pb2.PrepareRequest()
        self._progress: tuple[int, int] | None = None
        self._outcome = Future[list[Shard]]()

    def start(self, ident: int, request: stage_pb2.PrepareRequest, *, serves: bool) -> None:
        """Starts a load. `serves`: whether steps run during the load. Raises Unavailable while another load runs."""
        if self._thread is not None:
            raise Unavailable("another range is being loaded", retry_after_s=1)
        self._ident, self._request = ident, request
        self._progress, self._outcome = None, Future()
        self._thread = threading.Thread(target=self._load, args=(serves,), name="prepare", daemon=True)
        self._thread.start()

    def _load(self, serves: bool) -> None:
        try:
            if not serves:
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))
            self._outcome.set_result(self._memory.load(self._request, self._note))
        except BaseException as e:  # noqa: BLE001 - told by the engine's thread
            self._outcome.set_exception(e)

    def _note(self, done: int, total: int) -> None:
        self._progress = done, total

    def poll(self) -> bool:
        """Reports progress or the outcome. Returns whether there was news."""
        thread = self._thread
        if thread is None:
            return False
        if thread.is_alive():
            progress, self._progress = self._progress, None
            if progress is not None:
                self._tell(self._ident, *progress)
            return progress is not None
        self._thread = None
        outcome, self._outcome = self._outcome, Future()  # Not kept: the shards are the receiver's.
        self._done(self._ident, self._request, outcome)
        return True

    def join(self) -> None:
        """Waits for the load under way, because an order needs the memory now."""
        if self._thread is not None:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, self._thread.native_id or 0, 0)
            while self._thread is not None:
                self._thread.join(self._sign_s)
                self.poll()
