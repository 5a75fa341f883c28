"""Decode attention by our own Triton kernels, and rotary embedding in one kernel."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from stagemesh.errors import ConfigError

from .decode import LayerKind
from .tables import DecodeTables

BLOCK_BYTES = 128
"""Context slots that a program takes at once, times the bytes of a number: 64 slots of bf16."""
PROGRAMS_PER_PROCESSOR = 2
"""Number of programs per multiprocessor from which a row's context is not split further."""
PROCESSORS_WITHOUT_DEVICE = 16


def load_kernels() -> Any:
    """Imports the module of kernels.

    Raises:
        ConfigError: Triton is not installed.
    """
    try:
        return import_module(".triton_kernels", __package__)
    except ImportError as e:
        raise ConfigError(f"Triton cannot be imported ({e}): pip install triton, as PyTorch for CUDA does") from e


class TritonDecode:
    """A decode kernel for every kind of layer."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        """Raises ConfigError if Triton is not installed."""
        self._kernels = load_kernels()
        self.failures: tuple[type[Exception], ...] = (RuntimeError, self._kernels.TritonError)
        self._processors = PROCESSORS_WITHOUT_DEVICE
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count

    def refuses(self, kind: LayerKind) -> str | None:
        """Returns why it cannot serve layers of this kind, or None if it can."""
        if max(kind.k_dim, kind.v_dim) > 256:
            return f"heads of {max(kind.k_dim, kind.v_dim)} are too large, 256 is the most"
        return None

    def plan(self, tables: DecodeTables) -> None:
        """Does nothing: all data is read on the device."""

    def write(self, key: Tensor, value: Tensor, k_pages: Tensor, v_pages: Tensor, tables: DecodeTables) -> None:
        """See `TorchDecode.write`, but padding rows write nothing."""
        key, value = _dense_heads(key), _dense_heads(value)
        rows, kv_heads, k_dim = key.shape
        page, v_dim = k_pages.shape[2], v_pages.shape[3]
        self._kernels.write_kernel[(rows, kv_heads)](
            key, value, k_pages, v_pages, tables.packed,
            tables.packed.stride(0), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            KV_HEADS=kv_heads, PAGE=page, K_DIM=k_dim, V_DIM=v_dim,
            BLOCK_K=_power(k_dim), BLOCK_V=_power(v_dim), BLOCK_PAGE=_power(page),
        )  # fmt: skip

    def attend(
        self,
        query: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: DecodeTables,
        kind: LayerKind,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `TorchDecode.attend`."""
        query = _dense_heads(query)
        rows, splits = tables.rows, self.splits(tables, kind)
        shape = (rows, kind.heads, splits)
        part_out = torch.empty(*shape, kind.v_dim, dtype=torch.float32, device=query.device)
        part_top, part_sum = torch.empty(2, *shape, dtype=torch.float32, device=query.device)
        out = torch.empty(rows, kind.heads, kind.v_dim, dtype=query.dtype, device=query.device)
        groups = kind.heads // kind.kv_heads
        self._kernels.attend_kernel[(rows, kind.kv_heads, splits)](
            query, k_pages, v_pages, tables.packed, part_out, part_top, part_sum,
            kind.scaling, kind.softcap or 0.0, tables.packed.stride(0), query.stride(0), query.stride(1),
            KV_HEADS=kind.kv_heads, GROUPS=groups, PAGE=kind.page_size, K_DIM=kind.k_dim, V_DIM=kind.v_dim,
            BLOCK_G=max(16, _power(groups)), BLOCK_K=max(16, _power(kind.k_dim)), BLOCK_V=max(16, _power(kind.v_dim)),
            BLOCK_N=BLOCK_BYTES // kind.dtype.itemsize, SPLITS=splits,
            WINDOW=kind.window or 0, SOFTCAP=kind.softcap is not None,
            PRECISION="ieee" if kind.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        self._kernels.merge_kernel[(rows, kind.heads)](
            part_out, part_top, part_sum, part_top if sinks is None else sinks, out,
            HEADS=kind.heads, V_DIM=kind.v_dim, BLOCK_V=_power(kind.v_dim), SPLITS=splits, SINKS=sinks is not None,
        )  # fmt: skip
        return out

    def splits(self, tables: DecodeTables, kind: LayerKind) -> int:
        """Returns the number of pieces of a row's context: a power of two, from the largest context of these tables."""
        slots = tables.width * tables.page_size
        slots = slots if kind.window is None else min(slots, kind.window)
        wanted = PROGRAMS_PER_PROCESSOR * self._processors // (tables.rows * kind.kv_heads)
        most = max(1, min(wanted, -(-slots * kind.dtype.itemsize // BLOCK_BYTES)))
        return 1 << (most.bit_length() - 1)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates `query` [1, N, T, D] and `key` [1, K, T, D] by `cos` and `sin` [1, T, D]; a head's halves form pairs.

    It computes in fp32 and rounds once.
    """
    kernels = load_kernels()
    _, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    query, key, cos, sin = _dense_heads(query), _dense_heads(key), _dense_heads(cos), _dense_heads(sin)
    q_out = torch.empty(1, heads, tokens, dim, dtype=query.dtype, device=query.device)
    k_out = torch.empty(1, kv_heads, tokens, dim, dtype=key.dtype, device=key.device)
    if sin.stride(1) != cos.stride(1):
        cos, sin = cos.contiguous(), sin.contiguous()
    kernels.rope_kernel[(tokens, heads + kv_heads)](
        query, key, cos, sin, q_out, k_out, tokens,
        query.stride(2), query.stride(1), key.stride(2), key.stride(1), cos.stride(1),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK=_power(dim // 2),
    )  # fmt: skip
    return q_out, k_out


def _dense_heads(tensor: Tensor) -> Tensor:
    """Returns the tensor with contiguous heads, as the kernels need it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power(number: int) -> int:
    """Returns the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
