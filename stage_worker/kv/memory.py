"""Large CPU buffers that come directly from the system: zeroed, and allocated at the first access."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Makes a zeroed tensor, in huge pages if the system has them (fewer address translations).

    The memory is freed with the tensor's last view. Nothing is written, so an unused tensor costs nothing.
    Raises OSError when there is no memory.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # This is a hint. Kernels without huge pages refuse it.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
