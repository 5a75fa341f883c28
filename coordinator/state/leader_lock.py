"""Which of the coordinators on one state folder is the leader: the one that has its lock.

The lock is the system's: it ends with the process, however that ends. What the leader before wrote is on disk by then,
so the next one cannot hand out an epoch again.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from pathlib import Path

from stagemesh.errors import ConfigError

log = logging.getLogger(__name__)


class LeaderLock:
    """The lock file of a state folder."""

    def __init__(self, state_dir: str, look_s: float) -> None:
        """`look_s`: between two tries to take it. Raises ConfigError where the file cannot be written."""
        path = Path(state_dir) / "coordinator.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise ConfigError(
                f"--state-dir {state_dir}: cannot open {path} ({e}): give a folder that this user can write"
            ) from e
        self._state_dir = state_dir
        self._look_s = look_s

    async def take(self, stop: asyncio.Event) -> bool:
        """Waits until no other coordinator has it; False when told to stop before that."""
        told = False
        while not self._try():
            if not told:
                log.info("another coordinator has --state-dir %s; this one waits until it is gone", self._state_dir)
                told = True
            try:
                async with asyncio.timeout(self._look_s):
                    await stop.wait()
                return False
            except TimeoutError:
                continue
        return True

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Lets the next one have it."""
        os.close(self._fd)
