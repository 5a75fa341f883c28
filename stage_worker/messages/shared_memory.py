"""Makes the memory that the ranks of an agent share: for sums over ranks (native/exchange.h) and for torch.distributed.

The memory has no name, so nothing remains when the processes have ended. This module does not import torch, because the
agent does not.
"""

from __future__ import annotations

import os

ROOM_BYTES = 4 << 20
"""Size of one buffer of a rank. Larger sums take several rounds."""
COUNTER_BYTES = 64


def shared_memory_bytes(size: int) -> int:
    """Total size for `size` ranks: a counter and two buffers each."""
    return size * (COUNTER_BYTES + 2 * ROOM_BYTES)


def make_shared_memory(size: int) -> int:
    """Makes zeroed memory for the sums of `size` ranks. Returns its descriptor, which each rank inherits."""
    fd = os.memfd_create("stagemesh-exchange", os.MFD_CLOEXEC)
    os.ftruncate(fd, shared_memory_bytes(size))
    return fd


def make_store() -> int:
    """Makes an empty file for `torch.distributed.FileStore`. Returns its descriptor, which each rank inherits."""
    return os.memfd_create("stagemesh-store", os.MFD_CLOEXEC)
