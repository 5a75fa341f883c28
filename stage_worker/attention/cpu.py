"""Attention on a CPU: two batched matrix products at decode; bf16 `scaled_dot_product_attention` took twice as long."""

from __future__ import annotations

from .paged import PagedAttention


class CpuAttention(PagedAttention):
    """Plain torch over gathered pages."""
