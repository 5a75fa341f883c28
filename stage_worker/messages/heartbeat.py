"""Heartbeats: shared memory in which each rank writes what it is doing, and when it will write again at the latest.

A process that hangs keeps its sockets open, so only a deadline finds it. The rank knows best how long its work may
take, so it sets the deadline itself. Its agent watches it (agent/watchdog.py).
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from enum import IntEnum

from stagemesh.errors import InternalError

from .control import Kind

MAGIC, VERSION = b"SMHB", 1
HEADER = struct.Struct("<4sHH")
"""Magic, version, number of ranks."""
SLOT = struct.Struct("<IIdd")
"""One rank's heartbeat: activity, detail, time of writing, seconds until the next. Only that rank writes it. A reader
may see it half written; the watchdog needs several equal readings before it acts."""


class Activity(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    """It is not ready yet."""
    IDLE = 1
    """It polls for plans, inputs, credits and orders."""
    STEP = 2
    """It computes a step. Detail: number of tokens."""
    ORDER = 3
    """It carries out an order of the agent. Detail: the `Kind`."""
    LOAD = 4
    """It loads weights that an order asked for."""


@dataclass(frozen=True)
class Beat:
    """A heartbeat."""

    activity: Activity
    detail: int
    at: float
    """Time of writing: `time.monotonic()`, which all processes of a machine share."""
    allowed_s: float
    """Seconds within which the rank will write again."""

    def __str__(self) -> str:
        if self.activity is Activity.STEP:
            return f"in a step of {self.detail} tokens"
        return (
            f"at the order {Kind(self.detail).name}" if self.activity is Activity.ORDER else self.activity.name.lower()
        )


def make_heartbeats(size: int) -> int:
    """Makes the memory for `size` ranks that are starting. Returns its descriptor, to be handed to each of them."""
    fd = os.memfd_create("stagemesh-heartbeats", os.MFD_CLOEXEC)
    starting = SLOT.pack(Activity.STARTING, 0, 0.0, float("inf"))
    os.write(fd, HEADER.pack(MAGIC, VERSION, size) + size * starting)
    return fd


class Heartbeats:
    """The memory, mapped. Takes over the descriptor; raises InternalError for memory of another kind or size."""

    def __init__(self, fd: int, size: int) -> None:
        with os.fdopen(fd, "rb") as file:
            length = os.fstat(fd).st_size
            if length != HEADER.size + size * SLOT.size:
                raise InternalError(f"heartbeats of {size} ranks do not lie in {length} bytes")
            self._memory = mmap.mmap(file.fileno(), length)
        found = HEADER.unpack_from(self._memory)
        if found != (MAGIC, VERSION, size):
            raise InternalError(f"these are no heartbeats of version {VERSION} and {size} ranks: {found}")

    def write(self, rank: int, beat: Beat) -> None:
        """Called by the rank."""
        at = HEADER.size + rank * SLOT.size
        SLOT.pack_into(self._memory, at, beat.activity, beat.detail, beat.at, beat.allowed_s)

    def read(self, rank: int) -> Beat:
        """Called by the agent."""
        activity, detail, at, allowed_s = SLOT.unpack_from(self._memory, HEADER.size + rank * SLOT.size)
        return Beat(Activity(activity), detail, at, allowed_s)
