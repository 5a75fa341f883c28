"""Captured decode steps and the kernels in them, on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chain import PAGE_SIZE, Chain
from tiny_models import clear_prompts, make_checkpoint

from stagemesh.stage_worker.attention.backend import attend_prefill_sdpa, make_kernels
from stagemesh.stage_worker.attention.base import AttentionKind, AttentionMetadata
from stagemesh.stage_worker.attention.decode import LayerKind, difference
from stagemesh.stage_worker.attention.paged import attend_prefill
from stagemesh.stage_worker.model.batch import StepBatch
from stagemesh.stage_worker.model.plain.graphs import GraphedShard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: captured steps were NOT tried on one"),
]
KINDS = {
    "llama 8 B": LayerKind(32, 8, 128, 128, 16, torch.bfloat16, 128**-0.5, None, None, False),
    "llama 1 B": LayerKind(32, 8, 64, 64, 16, torch.bfloat16, 64**-0.5, None, None, False),
    "fp16": LayerKind(12, 4, 128, 128, 16, torch.float16, 0.1, None, None, False),
    "fp32": LayerKind(4, 2, 16, 16, 16, torch.float32, 0.25, None, None, False),
    "gemma 2": LayerKind(8, 4, 256, 256, 16, torch.bfloat16, 256**-0.5, 100, 50.0, False),
    "gpt-oss": LayerKind(64, 8, 64, 64, 16, torch.bfloat16, 0.125, 128, None, True),
    "deepseek": LayerKind(16, 16, 192, 128, 16, torch.bfloat16, 0.07, None, None, False),
}


@pytest.mark.parametrize("name", ["flashinfer", "triton"])
@pytest.mark.parametrize("model", KINDS)
def test_a_kernel_gives_what_plain_functions_give(name: str, model: str) -> None:
    device = torch.device("cuda")
    kernel = make_kernels([name], device)[0]
    if kernel.name != name:
        pytest.skip(f"{name.upper()} IS NOT INSTALLED: it was not tried")
    refused = kernel.refuses(KINDS[model])
    if refused is not None:
        pytest.skip(f"{name} refuses {model}: {refused}")
    assert difference(kernel, KINDS[model], device) is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_sw", "gemma2", "gpt_neox", "gpt_oss", "mixtral"])
def test_tokens_of_captured_steps_are_those_of_plain_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    folder = make_checkpoint(family, tmp_path)
    prompts = clear_prompts(folder, [1, 47, 300], 16)
    chain = Chain(folder, (0, 2, 6), device="cuda")
    assert chain.greedy([prompt.prompt_ids for prompt in prompts], 16) == [prompt.tokens for prompt in prompts]
    for shard in chain.shards:
        assert isinstance(shard, GraphedShard)
        print(family, shard.eager_because or sorted(shard.graphs))
        if family in ("llama", "qwen3", "mistral_sw", "gemma2", "gpt_neox"):
            assert shard.eager_because is None
            assert all(graph.captured is not None for graph in shard.graphs.values())


def graphed(folder: Path) -> GraphedShard:
    (shard,) = Chain(folder, (0, 6), device="cuda").shards
    assert isinstance(shard, GraphedShard)
    return shard


def step_of(tokens: list[int]) -> StepBatch:
    """Two rows of other positions and pages."""
    on_device = torch.tensor(tokens, device="cuda")
    wanted = torch.tensor([0, 1], device="cuda")
    return StepBatch([5, 40], [1, 1], [[0], [1, 2, 3]], PAGE_SIZE, token_ids=on_device, logit_rows=wanted)


def test_a_captured_step_neither_waits_nor_writes_over_the_last_ones_output(tmp_path: Path) -> None:
    shard = graphed(make_checkpoint("llama", tmp_path))
    first = shard.forward(step_of([1, 2]))
    kept = first.clone()
    later = step_of([7, 8])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shard.prepare(later)
        second = shard.forward(later)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_a_step_that_waits_runs_without_graphs(tmp_path: Path) -> None:
    shard = graphed(make_checkpoint("llama", tmp_path))
    layer = shard.plain.model.model.layers[3]
    handle = layer.register_forward_hook(lambda _module, _args, output: print(float(output.sum())))
    waiting = shard.forward(step_of([1, 2]))
    assert "synchron" in str(shard.eager_because)
    handle.remove()
    torch.testing.assert_close(graphed(make_checkpoint("llama", tmp_path)).forward(step_of([1, 2])), waiting)


@pytest.mark.parametrize(("start", "count"), [(0, 500), (300, 200)])
def test_flash_attention_over_pages_is_attention(start: int, count: int) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    table = list(range(40))[::-1]
    metadata = AttentionMetadata([start], [count], [table], 16, "cuda")
    (view,) = metadata.prefill_views(None)
    pages = (40, 8, 16, 128)
    k_pages, v_pages, query = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in (pages, pages, (count, 32, 128))
    )
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = attend_prefill_sdpa(query, k_pages, v_pages, view, 0.08)
    expected = attend_prefill(query, k_pages, v_pages, view, AttentionKind(0.08, None, None, None))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
