"""The attention of a shard.

It uses the plain functions. On a CUDA device it also uses kernels over page tables for captured decode steps, and
PyTorch's flash attention for prompts. Metadata is made on the host and copied once per step.

A kernel serves a kind of layer only after its output on this device agreed with the plain functions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from stagemesh.errors import ConfigError, InternalError

from .base import AttentionKind, AttentionMetadata, PrefillView
from .decode import DecodeKernel, LayerKind, TorchDecode, difference
from .flashinfer_decode import FlashinferDecode
from .paged import SCORES_BYTES, attend_decode, attend_prefill, write_pages
from .tables import DecodeTables
from .triton_decode import TritonDecode

log = logging.getLogger(__name__)

KERNELS = ("flashinfer", "triton", "torch")
"""Names of the decode kernels, in the order in which they are tried."""


class PagedAttention:
    """Writes a layer's new K and V to their pages, then attends."""

    def __init__(
        self,
        device: torch.device | str,
        kernels: Sequence[str | DecodeKernel] = KERNELS,
        scores_bytes: int = SCORES_BYTES,
    ) -> None:
        """Raises ConfigError for a device other than cpu and cuda.

        Args:
            kernels: decode kernels to try for captured steps, by name or as objects. If none can be used, the plain
                functions serve.
            scores_bytes: largest size of the scores of one block of a prompt's queries.
        """
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"no attention backend for device {kind!r}: use cpu or cuda")
        self._wanted = kernels
        self._scores_bytes = scores_bytes
        self._kernels: list[DecodeKernel] | None = None
        self._chosen: dict[LayerKind, DecodeKernel] = {}
        self._flash = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        metadata: AttentionMetadata | DecodeTables,
        kind: AttentionKind,
    ) -> Tensor:
        """Returns [T, N, Dv] for `query` [T, N, D], `key` [T, K, D], `value` [T, K, Dv] and pages [P, K, S, D].

        `metadata`: the rows of an eager step, or the tables of a captured one.
        """
        if isinstance(metadata, DecodeTables):
            layer = _layer_kind(query, k_pages, v_pages, kind)
            kernel = self._chosen.get(layer) or self._choose(layer, query.device)
            kernel.write(key, value, k_pages, v_pages, metadata)
            return kernel.attend(query, k_pages, v_pages, metadata, layer, kind.sinks)
        write_pages(key, value, k_pages, v_pages, metadata)
        prompts = metadata.prefill_views(kind.sliding_window)
        if not prompts:
            # This is two batched matrix products: bf16 `scaled_dot_product_attention` took twice as long on a CPU.
            return attend_decode(query, k_pages, v_pages, metadata, kind)
        out = torch.empty(*query.shape[:2], v_pages.shape[-1], dtype=query.dtype, device=query.device)
        if metadata.decode_views(kind.sliding_window):
            where = metadata.decode_tokens
            out[where] = attend_decode(query[where], k_pages, v_pages, metadata, kind)
        for view in prompts:
            out[view.tokens] = self._prefill(query[view.tokens], k_pages, v_pages, view, kind)
        return out

    def plan(self, tables: DecodeTables) -> None:
        """Plans the kernels for new rows in `tables`. Call it before a captured step is launched over them."""
        for kernel in self._kernels or ():
            kernel.plan(tables)

    def _choose(self, kind: LayerKind, device: torch.device) -> DecodeKernel:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InternalError("a decode kernel cannot be chosen during a graph capture: run the step once before")
        if self._kernels is None:
            self._kernels = make_kernels(self._wanted, device)
        for kernel in self._kernels:
            why = kernel.refuses(kind)
            if why is None and kernel.name != "torch":
                why = difference(kernel, kind, device)
            if why is None:
                log.info("decode attention of %s: %s", kind, kernel.name)
                self._chosen[kind] = kernel
                return kernel
            log.warning("decode attention of %s does not go through %s: %s", kind, kernel.name, why)
        raise InternalError("the plain functions refuse no layer")

    def _prefill(
        self, query: Tensor, k_pages: Tensor, v_pages: Tensor, view: PrefillView, kind: AttentionKind
    ) -> Tensor:
        """Computes a prompt by flash attention if it supports the layer, else by the plain function."""
        if self._flash and query.is_cuda and flash_knows(query, v_pages, view, kind):
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    return attend_prefill_sdpa(query, k_pages, v_pages, view, kind.scaling)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self._flash = False
                log.warning("prompts do not use PyTorch's flash attention here: %s", e)
        return attend_prefill(query, k_pages, v_pages, view, kind, self._scores_bytes)


def _layer_kind(query: Tensor, k_pages: Tensor, v_pages: Tensor, kind: AttentionKind) -> LayerKind:
    _, kv_heads, page_size, k_dim = k_pages.shape
    return LayerKind(
        heads=query.shape[1],
        kv_heads=kv_heads,
        k_dim=k_dim,
        v_dim=v_pages.shape[3],
        page_size=page_size,
        dtype=query.dtype,
        scaling=kind.scaling,
        window=kind.sliding_window,
        softcap=kind.softcap,
        has_sinks=kind.sinks is not None,
    )


def make_kernels(wanted: Sequence[str | DecodeKernel], device: torch.device) -> list[DecodeKernel]:
    """Returns the wanted kernels that work here, then the plain functions. Raises ConfigError for an unknown name."""
    plain = TorchDecode()
    made: list[DecodeKernel] = []
    for entry in wanted:
        if not isinstance(entry, str):
            made.append(entry)
        elif entry not in KERNELS:
            raise ConfigError(f"no decode kernel {entry!r}: use some of {', '.join(KERNELS)}")
        elif entry != plain.name:
            try:
                made.append(TritonDecode(device) if entry == "triton" else FlashinferDecode(device, _writer(device)))
            except ConfigError as e:
                log.info("no decode attention through %s: %s", entry, e.message)
    return [*made, plain]


def _writer(device: torch.device) -> DecodeKernel:
    try:
        return TritonDecode(device)
    except ConfigError:
        return TorchDecode()


def flash_knows(query: Tensor, v_pages: Tensor, view: PrefillView, kind: AttentionKind) -> bool:
    """Whether flash attention supports such a layer: 16 bits, one head size, plain causal attention."""
    if query.dtype not in (torch.bfloat16, torch.float16) or kind.softcap is not None or kind.sinks is not None:
        return False
    if kind.sliding_window is not None and kind.sliding_window < view.first_position + view.context_len:
        return False
    return query.shape[-1] == v_pages.shape[-1] <= 256 and query.shape[-1] % 8 == 0


def attend_prefill_sdpa(query: Tensor, k_pages: Tensor, v_pages: Tensor, view: PrefillView, scaling: float) -> Tensor:
    """Returns [C, N, Dv] for the last C positions [C, N, D] of a row that sees all earlier positions."""
    count, heads, head_dim = query.shape
    kv_heads, length = k_pages.shape[1], view.context_len
    rows = view.pages.of_heads(kv_heads)
    keys = k_pages.flatten(0, 1).index_select(0, rows).view(1, kv_heads, -1, head_dim)[:, :, :length]
    values = v_pages.flatten(0, 1).index_select(0, rows).view(1, kv_heads, -1, v_pages.shape[-1])[:, :, :length]
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=causal_lower_right(count, length),
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)
