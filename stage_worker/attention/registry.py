"""Attention backends by device type, imported when first asked for."""

from __future__ import annotations

import torch

from stagemesh.errors import ConfigError

from .base import AttentionBackend
from .paged import PagedAttention


def make_backend(device: torch.device | str) -> AttentionBackend:
    """The attention backend for a device. Raises ConfigError where there is none."""
    kind = torch.device(device).type
    if kind == "cpu":
        # Two batched matrix products at decode: bf16 `scaled_dot_product_attention` took twice as long.
        return PagedAttention()
    if kind == "cuda":
        from .cuda import CudaAttention

        return CudaAttention()
    raise ConfigError(f"no attention backend for device {kind!r}: use cpu or cuda")
