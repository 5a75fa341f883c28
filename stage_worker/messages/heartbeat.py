"""Heartbeats: shared memory in which each rank writes what it is doing, and its deadline for the next heartbeat.

A process that hangs keeps its sockets open, so only a deadline finds it. The rank knows best how long its work may
take, so it sets the deadline itself. The agent checks the deadlines (agent/watchdog.py).
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
"""Layout of the header: magic, version, number of ranks."""
SLOT = struct.Struct("<IIdd")
"""Layout of one rank's heartbeat: activity, detail, time of writing, seconds until the next. Only that rank writes it.
A reader may see it half written, so the watchdog needs several equal readings before it acts."""


class Activity(IntEnum):
    """What a rank is doing."""

    STARTING = 0
    """The rank is not ready yet."""
    IDLE = 1
    """The rank polls for plans, inputs, credits and orders."""
    STEP = 2
    """The rank computes a step. Detail: number of tokens."""
    ORDER = 3
    """The rank carries out an order of the agent. Detail: the `Kind`."""
    LOAD = 4
    """The rank loads weights for an order."""


@dataclass(frozen=True)
class Beat:
    """One heartbeat of a rank."""

    activity: Activity
    detail: int
    at: float
    """Time of writing by `time.monotonic()`, which all processes of a machine share."""
    allowed_s: float
    """Seconds within which the rank will write again."""

    def __str__(self) -> str:
        if self.activity is Activity.STEP:
            return f"in a step of {self.detail} tokens"
        return (
            f"at the order {Kind(self.detail).name}" if self.activity is Activity.ORDER else self.activity.name.lower()
        )


def make_heartbeats(size: int) -> int:
    """Makes the memory for `size` ranks that are starting. Returns its descriptor, which each rank inherits."""
    fd = os.memfd_create("stagemesh-heartbeats", os.MFD_CLOEXEC)
    starting = SLOT.pack(Activity.STARTING, 0, 0.0, float("inf"))
    os.write(fd, HEADER.pack(MAGIC, VERSION, size) + size * starting)
    return fd


class Heartbeats:
    """The mapped memory. It owns the descriptor. Raises InternalError for memory of another kind or size."""

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
        """Writes a heartbeat. The rank calls this."""
        at = HEADER.size + rank * SLOT.size
        SLOT.pack_into(self._memory, at, beat.activity, beat.detail, beat.at, beat.allowed_s)

    def read(self, rank: int) -> Beat:
        """Returns the last heartbeat of a rank. The agent calls this."""
        activity, detail, at, allowed_s = SLOT.unpack_from(self._memory, HEADER.size + rank * SLOT.size)
        return Beat(Activity(activity), detail, at, allowed_s)
