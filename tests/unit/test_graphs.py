"""Decode steps padded as graphs need it: what a stage gives is what it gives without. (Capture: tests/gpu.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from chain import PAGE_SIZE, Chain, Row
from tiny_models import make_checkpoint

from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.choose import load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.plain.fused import fuse_norms
from stagemesh.stage_worker.model.plain.graphs import GraphedShard, PaddedRows, page_widths
from stagemesh.stage_worker.model.plain.shard import ModelShard
from stagemesh.stage_worker.model.spec import ShardSpec

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = [[5, 9, 2, 77], list(range(3, 60)), [8]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch's threads wait for each other in a spin: beside other work, tiny models take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(chain: Chain) -> Chain:
    """The same chain with every stage's decode steps padded."""
    plain = chain.shards
    chain.shards = []
    for shard, pool in zip(plain, chain.pools, strict=True):
        assert isinstance(shard, ModelShard)
        chain.shards.append(GraphedShard(shard))
        chain.shards[-1].bind_kv(pool)
    return chain


@pytest.mark.parametrize("family", ["llama", "mistral_sw", "gemma2", "gpt_oss", "mixtral", "deepseek_v3"])
def test_padded_decode_gives_the_tokens_of_plain_decode(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    expected = Chain(folder, (0, 2, 6), enforce_eager=True).greedy(PROMPTS, 12)
    chain = padded(Chain(folder, (0, 2, 6), enforce_eager=True))
    assert chain.greedy(PROMPTS, 12) == expected
    for shard in chain.shards:
        assert isinstance(shard, GraphedShard)
        # The prompt of one token is a decode row of its own.
        assert set(shard.graphs) == {(1, 64), (4, 64)}


def test_padding_rows_leave_no_trace_in_the_pages(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    rows = [Row([7], 0, [3], True), Row([9], 0, [11], False), Row([4], 0, [200], True)]
    plain, chain = Chain(folder, (0, 6), enforce_eager=True), padded(Chain(folder, (0, 6), enforce_eager=True))
    torch.testing.assert_close(chain.step(rows), plain.step(rows), rtol=1e-4, atol=1e-5)
    for layer in plain.pools[0].layers:
        for pools in (KvPool.k, KvPool.v):
            expected, found = (pools(side.pools[0], layer.layer_idx) for side in (plain, chain))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def make_graphed(folder: Path, num_pages: int = 300) -> GraphedShard:
    plain = load_shard(ShardSpec(str(folder), 0, 2, enforce_eager=True), TensorParallel())
    assert isinstance(plain, ModelShard)
    shard = GraphedShard(plain)
    shard.bind_kv(KvPool(shard.kv_layers, num_pages, PAGE_SIZE, shard.dtype, "cpu"))
    return shard


def step_of(starts: list[int], counts: list[int] | None = None) -> StepBatch:
    counts = counts or [1] * len(starts)
    tables = [list(range((start + count - 1) // PAGE_SIZE + 1)) for start, count in zip(starts, counts, strict=True)]
    return StepBatch(starts, counts, tables, PAGE_SIZE, token_ids=torch.ones(sum(counts), dtype=torch.int64))


@pytest.mark.parametrize(
    ("starts", "key"),
    [
        ([0], (1, 64)),
        ([0, 5, 9], (4, 64)),
        ([3] * 25, (32, 64)),
        ([1023, 2], (2, 64)),
        ([1024, 2], (2, 256)),
        ([300 * PAGE_SIZE - 1], (1, 300)),
        ([300 * PAGE_SIZE], None),
        ([4] * 256, (256, 64)),
        ([4] * 257, None),
    ],
)
def test_a_step_goes_to_the_smallest_graph_that_holds_it(
    starts: list[int], key: tuple[int, int] | None, tmp_path: Path
) -> None:
    batch = step_of(starts)
    make_graphed(make_checkpoint("llama", tmp_path)).prepare(batch)
    assert (batch.prepared.key if isinstance(batch.prepared, PaddedRows) else None) == key


def test_steps_with_prompts_run_as_they_are(tmp_path: Path) -> None:
    shard = make_graphed(make_checkpoint("llama", tmp_path))
    batch = step_of([0, 40], [3, 1])
    shard.prepare(batch)
    assert shard.forward(batch).shape == (4, shard.hidden_size)
    assert not shard.graphs


def test_widths_end_with_the_pool() -> None:
    assert page_widths(10) == [10]
    assert page_widths(64) == [64]
    assert page_widths(5000) == [64, 256, 1024, 4096, 5000]


def test_only_norms_that_give_the_same_are_replaced() -> None:
    """Gemma's norm multiplies by one more than its weight."""
    for name, replaced in (("llama.modeling_llama.LlamaRMSNorm", True), ("gemma.modeling_gemma.GemmaRMSNorm", False)):
        family, file, norm_class = name.split(".")
        norm = getattr(getattr(getattr(transformers.models, family), file), norm_class)(32, eps=1e-3)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(5, 32)
        before = norm(x)
        assert fuse_norms(torch.nn.Sequential(norm)) == int(replaced)
        torch.testing.assert_close(norm(x), before)
