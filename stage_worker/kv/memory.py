"""Large memory on a CPU, straight from the system: zeroed, and taken when it is first touched."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor in huge pages where the system gives them (fewer address translations), freed with its last view.

    Nothing is written, so an idle one costs nothing. Raises OSError when there is no memory.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint: kernels without huge pages refuse it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
