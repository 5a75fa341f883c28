"""The paged KV cache of one worker: a K and a V tensor of pages for each layer that it holds.

Shapes: P pages, S positions per page, K KV heads on this rank, D head size. A page id is the same P-index in every
layer; the slot of a token is `page * page_size + offset`. Within a page, a head's positions are contiguous, so that one
gather returns a sequence's keys head by head, ready for a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stagemesh.errors import ConfigError

from .memory import zeros


@dataclass(frozen=True)
class KvLayerSpec:
    """What one decoder layer stores for one token on this rank."""

    layer_idx: int
    """Global index of the layer (the same on every stage)."""
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    sliding_window: int | None = None
    """Number of positions that a query of this layer sees, its own included; None for all."""

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of K and V of one token."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim) * dtype.itemsize


class KvPool:
    """Pages for all of a worker's layers, allocated once. The shard decides the layout within a page.

    The memory starts zeroed, and attention zeroes the rest of a page when it begins one. So a slot that no token of its
    sequence has written never holds NaN.
    """

    def __init__(
        self,
        layers: Sequence[KvLayerSpec],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        beside: Sequence[KvPool] = (),
    ) -> None:
        """`beside`: pools with the same number and size of pages. Layers that they have are shared with this pool.

        Raises ConfigError if `num_pages` or `page_size` is less than 1.
        """
        if num_pages < 1 or page_size < 1:
            raise ConfigError(f"a KV pool needs at least one page of one position, not {num_pages} of {page_size}")
        self.layers = tuple(layers)
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self._k: dict[int, torch.Tensor] = {}
        self._v: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            other = next((pool for pool in beside if layer in pool.layers), None)
            if other is not None:
                self._k[layer.layer_idx], self._v[layer.layer_idx] = other.k(layer.layer_idx), other.v(layer.layer_idx)
                continue
            heads = (num_pages, layer.num_kv_heads, page_size)
            self._k[layer.layer_idx] = self._allocate((*heads, layer.k_head_dim))
            self._v[layer.layer_idx] = self._allocate((*heads, layer.v_head_dim))

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.device.type == "cpu":
            return zeros(shape, self.dtype)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @staticmethod
    def page_bytes(layers: Sequence[KvLayerSpec], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over `layers`."""
        return page_size * sum(layer.bytes_per_token(dtype) for layer in layers)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers of this rank."""
        return self.page_bytes(self.layers, self.page_size, self.dtype)

    @property
    def num_tokens(self) -> int:
        """Token positions that fit."""
        return self.num_pages * self.page_size

    def k(self, layer_idx: int) -> torch.Tensor:
        """Keys [P, K, S, D] of the layer with this global index."""
        return self._k[layer_idx]

    def v(self, layer_idx: int) -> torch.Tensor:
        """Values [P, K, S, Dv] of the layer with this global index."""
        return self._v[layer_idx]

    def zero(self) -> None:
        """Zeroes all pages. Tests use this to prove that their checks depend on the cache."""
        for tensor in (*self._k.values(), *self._v.values()):
            tensor.zero_()
