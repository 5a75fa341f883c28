"""The shard on a CUDA device: the same tokens as transformers in fp32. Skips, and says so, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chain import PAGE_SIZE, Chain
from tiny_models import clear_prompts, make_checkpoint

from stagemesh.stage_worker.model.batch import StepBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the shard was not tried on one"),
]
FAMILIES = ["llama", "qwen3", "mistral_sw", "gemma2", "gpt_neox", "mixtral", "deepseek_v3", "gpt_oss"]
MAX_TOKENS = 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_split_equals_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    folder = make_checkpoint(family, tmp_path)
    prompts = clear_prompts(folder, [1, 47, 300], MAX_TOKENS)
    chain = Chain(folder, (0, 2, 6), device="cuda")
    asked, expected = [prompt.prompt_ids for prompt in prompts], [prompt.tokens for prompt in prompts]
    assert chain.greedy(asked, MAX_TOKENS) == expected
    forgot = chain.greedy(asked, MAX_TOKENS, forget=True)
    assert all(some != right for some, right in zip(forgot, expected, strict=True))


def test_a_decode_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """A step that waits would stop the caller from driving its links meanwhile."""
    chain = Chain(make_checkpoint("llama", tmp_path), (0, 6), device="cuda")
    (shard,) = chain.shards
    tokens, wanted = torch.tensor([1, 2], device="cuda"), torch.tensor([0, 1], device="cuda")
    batch = StepBatch([5, 40], [1, 1], [[0], [1, 2, 3]], PAGE_SIZE, token_ids=tokens, logit_rows=wanted)
    shard.prepare(batch)
    shard.forward(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = shard.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()
