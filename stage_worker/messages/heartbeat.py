"""What a rank tells its agent without a message: memory that they share, in which a rank writes what it is at.

A process that hangs keeps its sockets open, so only a deadline sees it. The rank names that deadline itself whenever it
begins something, and its agent (agent/watchdog.py) holds it to that.
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
"""Of one rank, which alone writes it: activity, detail, when it was written, how long it may stay so. A reader may see
it half written, and looks again before anything follows from it."""


class Activity(IntEnum):
    """What a rank is at."""

    STARTING = 0
    """It is not up yet."""
    IDLE = 1
    """It waits for plans, inputs, credits and orders, and looks for them again and again."""
    STEP = 2
    """It computes a step; the detail is its tokens."""
    ORDER = 3
    """It carries out an order of the agent; the detail is its kind."""
    LOAD = 4
    """It has come further with the weights that an order names."""


@dataclass(frozen=True)
class Beat:
    """What a rank has written last."""

    activity: Activity
    detail: int
    at: float
    """When (`time.monotonic()`, which processes of one machine share)."""
    allowed_s: float
    """Within which it will write again."""

    def __str__(self) -> str:
        if self.activity is Activity.STEP:
            return f"in a step of {self.detail} tokens"
        return (
            f"at the order {Kind(self.detail).name}" if self.activity is Activity.ORDER else self.activity.name.lower()
        )


def make_heartbeats(size: int) -> int:
    """A descriptor of memory for `size` ranks, to be handed to each; all of them are starting."""
    fd = os.memfd_create("stagemesh-heartbeats", os.MFD_CLOEXEC)
    starting = SLOT.pack(Activity.STARTING, 0, 0.0, float("inf"))
    os.write(fd, HEADER.pack(MAGIC, VERSION, size) + size * starting)
    return fd


class Heartbeats:
    """The memory as a process has it. Takes over its descriptor; raises InternalError where it is another's."""

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
        """By the rank."""
        at = HEADER.size + rank * SLOT.size
        SLOT.pack_into(self._memory, at, beat.activity, beat.detail, beat.at, beat.allowed_s)

    def read(self, rank: int) -> Beat:
        """By the agent."""
        activity, detail, at, allowed_s = SLOT.unpack_from(self._memory, HEADER.size + rank * SLOT.size)
        return Beat(Activity(activity), detail, at, allowed_s)
