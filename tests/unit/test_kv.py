"""The KV pool: sizes and forgetting."""

from __future__ import annotations

import pytest
import torch

from stagemesh.errors import ConfigError
from stagemesh.stage_worker.kv.copy import PageFrames
from stagemesh.stage_worker.kv.pool import KvLayerSpec, KvPool

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


def test_a_pool_beside_another_has_the_layers_in_common_with_it() -> None:
    before = KvPool([KvLayerSpec(i, 2, 4, 4) for i in (0, 1, 2)], 3, 8, torch.float32, "cpu")
    after = KvPool([KvLayerSpec(i, 2, 4, 4) for i in (1, 2, 3)], 3, 8, torch.float32, "cpu", [before])
    before.k(1)[0] = 5.0
    assert after.k(1)[0].eq(5.0).all()
    assert after.k(3).eq(0.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_that_are_read_as_a_frame_are_the_same_elsewhere(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    layers = [KvLayerSpec(i, 2, 4, 6) for i in (4, 5, 6)]
    source, target = (KvPool(layers, pages, 8, dtype, "cpu") for pages in (5, 9))
    for layer in layers:
        source.k(layer.layer_idx).copy_(torch.randn(5, 2, 8, 4))
        source.v(layer.layer_idx).copy_(torch.randn(5, 2, 8, 6))
    here, there = (PageFrames([(pool, [5, 6])]) for pool in (source, target))
    frame = here.read([4, 1, 2])
    assert frame.nbytes == 3 * here.page_bytes == 3 * KvPool.page_bytes(layers[1:], 8, dtype)
    there.write([8, 0, 3], frame)
    for layer in (5, 6):
        assert target.k(layer)[[8, 0, 3]].equal(source.k(layer)[[4, 1, 2]])
        assert target.v(layer)[[8, 0, 3]].equal(source.v(layer)[[4, 1, 2]])
        assert target.k(layer)[[1, 2, 4]].eq(0).all()
    assert target.k(4).eq(0).all()
