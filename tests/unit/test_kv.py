"""The KV pool: sizes and forgetting."""

from __future__ import annotations

import pytest
import torch

from stagemesh.errors import ConfigError
from stagemesh.stage_worker.kv import KvLayerSpec, KvPool

LAYERS = [KvLayerSpec(3, 2, 8, 6), KvLayerSpec(4, 1, 8, 8, sliding_window=16)]


def test_layers_keep_their_global_index_and_own_shapes() -> None:
    pool = KvPool(LAYERS, num_pages=5, page_size=16, dtype=torch.bfloat16, device="cpu")
    assert pool.k(3).shape == (5, 2, 16, 8)
    assert pool.v(3).shape == (5, 2, 16, 6)
    assert pool.k(4).shape == pool.v(4).shape == (5, 1, 16, 8)
    assert pool.num_tokens == 80


def test_page_bytes_are_what_the_tensors_take() -> None:
    pool = KvPool(LAYERS, num_pages=5, page_size=16, dtype=torch.bfloat16, device="cpu")
    taken = sum(tensor.nbytes for index in (3, 4) for tensor in (pool.k(index), pool.v(index)))
    assert pool.bytes_per_page * pool.num_pages == taken
    assert KvPool.page_bytes(LAYERS, 16, torch.float32) == 2 * pool.bytes_per_page


def test_zero_forgets_everything() -> None:
    pool = KvPool(LAYERS, num_pages=2, page_size=4, dtype=torch.float32, device="cpu")
    pool.k(3).fill_(1)
    pool.v(4).fill_(float("nan"))
    pool.zero()
    assert not any(tensor.any() for index in (3, 4) for tensor in (pool.k(index), pool.v(index)))


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ConfigError, match=f"{num_pages} of {page_size}"):
        KvPool(LAYERS, num_pages, page_size, torch.float32, "cpu")
