"""Memory that an agent makes for its ranks to share: for sums over ranks (native/exchange.h) and for torch.distributed.

It has no name, so nothing is left of it when the processes are gone. This module does not import torch, since the agent
does not.
"""

from __future__ import annotations

import os

ROOM_BYTES = 4 << 20
"""Size of one buffer of a rank. Larger sums go in several rounds."""
COUNTER_BYTES = 64


def shared_memory_bytes(size: int) -> int:
    """Total for `size` ranks: a counter and two buffers each."""
    return size * (COUNTER_BYTES + 2 * ROOM_BYTES)


def make_shared_memory(size: int) -> int:
    """Makes zeroed memory for the sums of `size` ranks. Returns its descriptor, to be handed to each of them."""
    fd = os.memfd_create("stagemesh-exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, shared_memory_bytes(size))
    return fd


def make_store() -> int:
    """Makes an empty file for `torch.distributed.FileStore`. Returns its descriptor, to be handed to each rank."""
    return os.memfd_create("stagemesh-store", os.MFD_CLOEXEC)
