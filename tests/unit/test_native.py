"""The compiled kernels against transformers' modules, and what they promise beyond: a row's result is its own."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import PAGE_SIZE, Chain, Row
from tiny_models import make_checkpoint

from stagemesh.errors import TransportError
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.messages.shared_memory import make_shared_memory
from stagemesh.stage_worker.model.choose import kernel_model, load_shard
from stagemesh.stage_worker.model.parallel import TensorParallel
from stagemesh.stage_worker.model.plain.shard import ModelShard
from stagemesh.stage_worker.model.spec import ShardSpec
from stagemesh.stage_worker.native import ops
from stagemesh.stage_worker.native.model import NotNative
from stagemesh.stage_worker.native.shard import NativeShard

pytestmark = pytest.mark.skipif(
    ops.library() is None, reason="NO COMPILED KERNELS: not built, or a processor without AVX512-BF16"
)
WIDE = {"hidden_size": 192, "intermediate_size": 336, "num_attention_heads": 6, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama_tied", {}),
    "llama_wide": ("llama", {**WIDE, "head_dim": 80, "vocab_size": 301}),
    "llama_biased": ("llama", {"attention_bias": True}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral_sw": ("mistral_sw", {}),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = MODELS[request.param]
    return make_checkpoint(family, tmp_path_factory.mktemp(request.param), **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG, SHORT, ONE = tokens(150, 1), tokens(37, 2), tokens(1, 3)
TABLES = [list(range(20, 8, -1)), [0, 2, 4], [31]]
STEPS = [
    [Row(LONG[:101], 0, TABLES[0], True), Row(SHORT[:20], 0, TABLES[1], False), Row(ONE, 0, TABLES[2], True)],
    [Row(LONG[101:], 101, TABLES[0], True), Row(SHORT[20:], 20, TABLES[1], True), Row([9], 1, TABLES[2], True)],
    [Row([5], 150, TABLES[0], True), Row([6], 37, TABLES[1], True), Row([7], 2, TABLES[2], True)],
]
"""Prompt chunks and decode rows together, pages out of order, contexts beyond the window of the windowed model."""


def logits(model: Path, dtype: str, **settings: Any) -> list[torch.Tensor]:
    chain = Chain(model, (0, 2, 6), dtype=dtype, **settings)
    kind = ModelShard if settings.get("enforce_eager") else NativeShard
    assert all(isinstance(shard, kind) for shard in chain.shards)
    return [chain.step(rows) for rows in STEPS]


def worst(some: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(some, other, strict=True))


def test_in_fp32_they_agree_to_rounding(model: Path) -> None:
    assert worst(logits(model, "float32"), logits(model, "float32", enforce_eager=True)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_linears_that_are_read_in_several_blocks_are_packed_whole(tmp_path: Path, tied: bool) -> None:
    """Queries end within one block and keys within the next; gate, up and vocabulary end within a panel."""
    sizes = {"hidden_size": 512, "head_dim": 240, "num_attention_heads": 8, "num_key_value_heads": 4}
    more = {"intermediate_size": 2100, "vocab_size": 2405, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    model = make_checkpoint("llama", tmp_path, **sizes, **more)
    ours, theirs = (Chain(model, (0, 1), enforce_eager=eager).step(STEPS[0]) for eager in (False, True))
    assert worst([ours], [theirs]) < 1e-5


def test_in_bf16_they_are_as_near_to_fp32_as_the_modules_are(model: Path) -> None:
    exact = logits(model, "float32", enforce_eager=True)
    ours, theirs = logits(model, "bfloat16"), logits(model, "bfloat16", enforce_eager=True)
    assert worst(ours, exact) < 1.1 * worst(theirs, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_gives_the_same_bits_alone_in_chunks_and_with_more_threads(model: Path, dtype: str) -> None:
    together = logits(model, dtype)
    assert all(torch.equal(a, b) for a, b in zip(together, logits(model, dtype, threads=2), strict=True))
    idle = tuple(sorted(os.sched_getaffinity(0)))
    assert all(torch.equal(a, b) for a, b in zip(together, logits(model, dtype, idle_cores=idle), strict=True))
    alone = Chain(model, (0, 6), dtype=dtype)
    for start in range(0, 150, 13):
        last = alone.step([Row(LONG[start : start + 13], start, TABLES[0], True)])
    assert torch.equal(last[0], together[1][0])
    assert torch.equal(alone.step([Row([5], 150, TABLES[0], True)])[0], together[2][0])


def test_a_step_that_runs_alone_uses_idle_cores_and_others_do_not(llama: Path) -> None:
    """Threads of this process that gained processor time."""
    cores = tuple(sorted(os.sched_getaffinity(0)))[:1]

    def working(chain: Chain) -> int:
        # More work than a helper can miss.
        rows = [Row(tokens(150, i), 0, list(range(12 * i, 12 * i + 12)), True) for i in range(12)]
        before = _thread_times()
        for _ in range(20):
            chain.step(rows)
        gained = [after - before.get(thread, 0) for thread, after in _thread_times().items()]
        return sum(time_ns > 0.2 * max(gained) for time_ns in gained)

    chain = Chain(llama, (0, 6), idle_cores=cores)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = working(chain)
        chain.alone = False
        assert (alone, working(chain)) == (2, 1)
    finally:
        torch.set_num_threads(threads)


def _thread_times() -> dict[str, int]:
    """Nanoseconds that each thread of this process has run."""
    tasks = Path("/proc/self/task")
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()}


def test_their_threads_are_not_put_aside_as_a_load_was(llama: Path) -> None:
    """A load beside serving gives way, and whoever made a thread gave it how nice it is."""
    before, shards, own = set(os.listdir("/proc/self/task")), list[Any](), os.getpriority(os.PRIO_PROCESS, 0)
    if own > 9:
        pytest.skip("nothing can be ten steps nicer than this process")

    def load() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + 10)
        shards.append(load_shard(ShardSpec(str(llama), 0, 2, page_size=PAGE_SIZE, threads=3), TensorParallel()))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    (shard,) = shards
    shard.bind_kv(KvPool(shard.kv_layers, 4, PAGE_SIZE, shard.dtype, shard.device))
    made = [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in set(os.listdir("/proc/self/task")) - before]
    # Those of the one that loaded (torch has some, too) compute no steps.
    assert made.count(own) == 2


def test_a_page_that_held_infinity_is_clean_for_the_next_sequence(llama: Path) -> None:
    chain = Chain(llama, (0, 6))
    rows = [Row(SHORT, 0, TABLES[1], True)]
    clean = chain.step(rows)
    for pool in chain.pools:
        for layer in pool.layers:
            pool.v(layer.layer_idx).fill_(float("nan"))
            pool.k(layer.layer_idx).fill_(float("inf"))
    assert torch.equal(chain.step(rows), clean)


@pytest.mark.parametrize(
    "spec",
    [
        {"page_size": 8},
        {"enforce_eager": True},
        {"device": "cuda"},
        {"tp_size": 3},
    ],
)
def test_what_does_not_fit_them_goes_to_the_modules(llama: Path, spec: dict[str, Any]) -> None:
    with pytest.raises(NotNative):
        kernel_model(ShardSpec(str(llama), 0, 6, **spec))


def test_without_a_compiler_the_modules_serve(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "library", lambda: None)
    shard = load_shard(ShardSpec(str(llama), 0, 6, page_size=PAGE_SIZE), TensorParallel())
    assert isinstance(shard, ModelShard)


def test_a_rank_that_never_comes_ends_the_step_with_an_error(llama: Path) -> None:
    fd = make_shared_memory(2)
    parallel = TensorParallel(0, 2, exchange_fd=fd, timeout_s=0.2)
    chain = Chain(llama, (0, 6), parallel=parallel)
    assert isinstance(chain.shards[0], NativeShard)
    started = time.monotonic()
    with pytest.raises(TransportError, match="rank"):
        chain.step(STEPS[0])
    assert 0.2 <= time.monotonic() - started < 5
