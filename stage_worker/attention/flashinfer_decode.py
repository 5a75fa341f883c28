"""Decode attention by flashinfer. Its layout HND is that of the pages: [P, K, S, D].

flashinfer makes a plan on the host that distributes the work of a step over the device. It needs one plan for each
number of rows and kind of layer. Its buffers stay in place, so a captured step reads the next plan when it is launched
again.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stagemesh.errors import ConfigError, InternalError

from .decode import DecodeKernel, LayerKind
from .tables import DecodeTables

WORKSPACE_BYTES = 128 << 20
TENSOR_CORE_GROUPS = 4
"""Number of query heads per KV head from which matrix units are faster than reading each key for every head."""


class FlashinferDecode:
    """A decode kernel for head sizes 64, 128 and 256 without sinks. It writes pages through another kernel."""

    name = "flashinfer"
    failures: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, NotImplementedError, OSError)

    def __init__(self, device: torch.device, writer: DecodeKernel) -> None:
        """Raises ConfigError if flashinfer is not installed, or if there is no CUDA device."""
        if device.type != "cuda":
            raise ConfigError(f"flashinfer needs a CUDA device, not {device}")
        try:
            self._wrapper_class = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
        except (ImportError, OSError, AttributeError) as e:
            raise ConfigError(f"flashinfer cannot be imported ({e}): pip install flashinfer-python") from e
        self.write = writer.write
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: WeakKeyDictionary[DecodeTables, dict[LayerKind, Any]] = WeakKeyDictionary()

    def refuses(self, kind: LayerKind) -> str | None:
        """Returns why it cannot serve layers of this kind, or None if it can."""
        if kind.has_sinks:
            return "it knows no attention sinks"
        if kind.k_dim != kind.v_dim or kind.k_dim not in (64, 128, 256):
            return f"it knows no heads of {kind.k_dim} and {kind.v_dim}"
        if kind.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in 16 bits, not in {kind.dtype}"
        return None

    def plan(self, tables: DecodeTables) -> None:
        """Plans the rows now in `tables`, for every kind of layer that has run over these tables."""
        for kind, wrapper in self._wrappers.get(tables, {}).items():
            _plan(wrapper, tables, kind)

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
        wrappers = self._wrappers.setdefault(tables, {})
        if kind not in wrappers:
            if torch.cuda.is_current_stream_capturing():
                raise InternalError("flashinfer cannot plan a new kind of layer during the capture of a graph")
            wrappers[kind] = self._make(tables, kind)
            _plan(wrappers[kind], tables, kind)
        out: Tensor = wrappers[kind].run(query, (k_pages, v_pages))
        return out

    def _make(self, tables: DecodeTables, kind: LayerKind) -> Any:
        device = tables.packed.device

        def buffer(length: int) -> Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        return self._wrapper_class(
            self._workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=kind.heads // kind.kv_heads >= TENSOR_CORE_GROUPS,
            paged_kv_indptr_buffer=buffer(tables.rows + 1),
            paged_kv_indices_buffer=buffer(tables.rows * tables.width),
            paged_kv_last_page_len_buffer=buffer(tables.rows),
        )


def plan_arrays(tables: DecodeTables) -> tuple[Tensor, Tensor, Tensor]:
    """Returns flashinfer's arrays: [B + 1] where each row's pages begin, all pages, [B] positions in the last page.

    They are int32 on the host. Padding rows have one position of page 0: flashinfer does not support empty rows.
    """
    lengths = tables.host[:, 0].clamp_min(1)
    used = (lengths + tables.page_size - 1) // tables.page_size
    begins = torch.nn.functional.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
    pages = tables.host[:, 1:][torch.arange(tables.width) < used[:, None]]
    last = (lengths - 1) % tables.page_size + 1
    if torch.cuda.is_available():
        return begins.pin_memory(), pages.pin_memory(), last.pin_memory()
    return begins, pages, last


def _plan(wrapper: Any, tables: DecodeTables, kind: LayerKind) -> None:
    begins, pages, last = plan_arrays(tables)
    wrapper.plan(
        begins,
        # flashinfer would copy these from host memory while the host waits.
        pages.to(tables.packed.device, non_blocking=True),
        last,
        kind.heads,
        kind.kv_heads,
        kind.k_dim,
        kind.page_size,
        pos_encoding_mode="NONE",
        window_left=-1 if kind.window is None else kind.window - 1,
        logits_soft_cap=kind.softcap,
        q_data_type=kind.dtype,
        kv_data_type=kind.dtype,
        sm_scale=kind.scaling,
    )
