"""A rank's access to the memory that its group shares for sums (exchange.h)."""

from __future__ import annotations

import mmap
import os

import torch

from ..messages.shared_memory import ROOM_BYTES, shared_memory_bytes
from . import ops


class Exchange:
    """This rank's part of the shared memory. It lives as long as the process: its round counter must not restart.

    It closes the descriptor `fd` of `make_shared_memory`.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self._map = mmap.mmap(fd, shared_memory_bytes(size))
        os.close(fd)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        address = self._memory.data_ptr()
        self.handle: int = ops.loaded().stagemesh_exchange_open(address, rank, size, ROOM_BYTES, timeout_s)
