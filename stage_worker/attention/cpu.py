"""Attention on a CPU: two batched matrix products at decode (bf16 SDPA is the slowest choice there, docs/models.md)."""

from __future__ import annotations

from .paged import PagedAttention


class CpuAttention(PagedAttention):
    """Plain torch over gathered pages."""
