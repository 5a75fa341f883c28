"""Memory that the ranks of one worker share, made by their agent: for their sums (native/exchange.h), and for the store
over which torch.distributed has them find each other.

It has no name, so nothing is left of it when the processes are gone. No torch here: the agent does without.
"""

from __future__ import annotations

import os

ROOM_BYTES = 4 << 20
"""Of one rank's room: larger sums go in several rounds."""
COUNTER_BYTES = 64


def shared_memory_bytes(size: int) -> int:
    """For `size` ranks: a counter and two rooms each."""
    return size * (COUNTER_BYTES + 2 * ROOM_BYTES)


def make_shared_memory(size: int) -> int:
    """A descriptor of zeroed memory for `size` ranks, to be handed to each; pages are taken when touched."""
    fd = os.memfd_create("stagemesh-exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, shared_memory_bytes(size))
    return fd


def make_store() -> int:
    """A descriptor of an empty file for `torch.distributed.FileStore`, to be handed to each rank."""
    return os.memfd_create("stagemesh-store", os.MFD_CLOEXEC)


def path_of(fd: int) -> str:
    """Under which this process opens the file behind a descriptor anew, with locks of its own."""
    return f"/proc/self/fd/{fd}"
