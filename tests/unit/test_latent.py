"""Multi-head latent attention through the compiled kernels: what its pages hold, and how they are copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chain import PAGE_SIZE, Chain, Row
from tiny_models import make_checkpoint

from stagemesh.stage_worker.kv.copy import PageFrames
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.native import ops

pytestmark = pytest.mark.skipif(ops.library() is None, reason="NO COMPILED KERNELS")
RANK, ROTATED = 32, 8
PROMPT, TABLE = list(range(5, 60)), [3, 1, 0, 2]


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        "deepseek_v3", tmp_path_factory.mktemp("deepseek"), kv_lora_rank=RANK, qk_rope_head_dim=ROTATED
    )


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_token_takes_the_latent_and_the_rotated_part(deepseek: Path, dtype: str, size: int) -> None:
    shard = Chain(deepseek, (0, 2), dtype=dtype).shards[0]
    assert {layer.bytes_per_token(shard.dtype) for layer in shard.kv_layers} == {(RANK + ROTATED) * size}


def test_copied_pages_go_on_where_the_others_were(deepseek: Path) -> None:
    here, there = Chain(deepseek, (0, 2), num_pages=4), Chain(deepseek, (0, 2), num_pages=4)
    here.step([Row(PROMPT, 0, TABLE, True)])
    layers = [layer.layer_idx for layer in here.pools[0].layers]
    frame = PageFrames([(here.pools[0], layers)]).read(TABLE)
    PageFrames([(there.pools[0], layers)]).write(TABLE, frame)
    expected, got = (chain.step([Row([7], len(PROMPT), TABLE, True)]) for chain in (here, there))
    assert torch.equal(got, expected)


def test_what_a_page_held_before_does_not_matter(deepseek: Path) -> None:
    def computed(left_behind: float) -> torch.Tensor:
        chain = Chain(deepseek, (0, 2), num_pages=4)
        pool: KvPool = chain.pools[0]
        for layer in pool.layers:
            pool.k(layer.layer_idx).fill_(left_behind)
        chain.step([Row(PROMPT[: PAGE_SIZE + 3], 0, TABLE, True)])
        return chain.step([Row([7], PAGE_SIZE + 3, TABLE, True)])

    assert torch.equal(computed(float("nan")), computed(0.0))
