"""Attention backends by device type, imported when first asked for."""

from __future__ import annotations

from importlib import import_module

import torch

from stagemesh.errors import ConfigError

from .base import AttentionBackend

_BACKENDS = {"cpu": (".cpu", "CpuAttention"), "cuda": (".cuda", "CudaAttention")}


def make_backend(device: torch.device | str) -> AttentionBackend:
    """The attention backend for a device.

    Raises:
        ConfigError: no backend runs there.
    """
    kind = torch.device(device).type
    if kind not in _BACKENDS:
        raise ConfigError(f"no attention backend for device {kind!r}: use one of {', '.join(sorted(_BACKENDS))}")
    module, name = _BACKENDS[kind]
    backend: AttentionBackend = getattr(import_module(module, __package__), name)()
    return backend
