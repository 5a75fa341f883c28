"""CPU memory that comes directly from the system: zeroed, and allocated at the first access."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch


def zeros(shape: tuple[int, ...], dtype: torch.dtype, *, huge_pages: bool = True) -> torch.Tensor:
    """Makes a zeroed tensor. `huge_pages`: in such pages if the system has them (fewer address translations).

    The memory goes back to the system with the tensor's last view. From C's heap, where torch allocates, that is not
    certain. Nothing is written, so an unused tensor costs nothing. Raises OSError when there is no memory.
    """
    count = max(1, math.prod(shape))
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # This is a hint. Kernels without huge pages refuse it.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)[: math.prod(shape)].view(shape)


class Scratch:
    """Memory for one tensor after the other. It grows to the largest of them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Returns a tensor with any content. It is valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.nbytes < size:
            self._bytes = zeros((size,), torch.uint8, huge_pages=False)
        return self._bytes[:size].view(dtype).view(shape)


def trim_heap() -> None:
    """Gives the free memory of C's heap back to the system, if this C library can (glibc)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
