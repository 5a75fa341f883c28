"""Attention on a CUDA device, without kernels of its own: the same steps, no synchronisation with the host."""

from __future__ import annotations

from .paged import PagedAttention


class CudaAttention(PagedAttention):
    """Plain torch over gathered pages; metadata is made on the host and copied once a step."""
