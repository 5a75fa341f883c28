"""A chain of shards in one process gives transformers' own greedy tokens, whatever the split, chunks and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chain import PAGE_SIZE, Chain, Row
from tiny_models import ClearPrompt, clear_prompts, make_checkpoint

from stagemesh.errors import InternalError
from stagemesh.stage_worker.kv.pool import KvPool
from stagemesh.stage_worker.model.batch import StepBatch

FAMILIES = ["llama", "qwen3", "mistral_sw", "gemma2", "gpt_neox", "mixtral"]
MAX_TOKENS = 8


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ClearPrompt]]:
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return folder, clear_prompts(folder, [1, 16, 130, 47], MAX_TOKENS)


@pytest.fixture(params=[False, True], ids=["kernels", "eager"])
def eager(request: pytest.FixtureRequest) -> bool:
    """Through compiled kernels where they know the model, and through transformers' modules."""
    return bool(request.param)


@pytest.mark.parametrize(
    ("bounds", "chunk"), [((0, 6), 512), ((0, 1, 6), 16), ((0, 2, 4, 6), 47), ((0, 1, 2, 3, 4, 6), 33)]
)
def test_split_equals_whole(
    model: tuple[Path, list[ClearPrompt]], bounds: tuple[int, ...], chunk: int, eager: bool
) -> None:
    folder, prompts = model
    chain = Chain(folder, bounds, enforce_eager=eager)
    expected = [prompt.tokens for prompt in prompts]
    asked = [prompt.prompt_ids for prompt in prompts]
    assert chain.greedy(asked, MAX_TOKENS, chunk=chunk) == expected
    chain.zero_kv()
    assert chain.greedy(asked[::-1], MAX_TOKENS, chunk=chunk) == expected[::-1]
    forgot = chain.greedy(asked, MAX_TOKENS, chunk=chunk, forget=True)
    assert all(some != right for some, right in zip(forgot, expected, strict=True)), "the KV is not what decides"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def test_prefill_and_decode_share_a_step(llama: Path, eager: bool) -> None:
    first, second = clear_prompts(llama, [20, 60], 3)
    chain = Chain(llama, (0, 3, 6), enforce_eager=eager)
    one, two = list(range(4)), list(range(10, 16))
    chain.step([Row(first.prompt_ids, 0, one, False)])
    logits = chain.step([Row(second.prompt_ids[:40], 0, two, False), Row(first.prompt_ids[-1:], 19, one, True)])
    assert logits.argmax(-1).tolist() == first.tokens[:1]
    logits = chain.step([Row(first.tokens[:1], 20, one, True), Row(second.prompt_ids[40:], 40, two, True)])
    assert logits.argmax(-1).tolist() == [first.tokens[1], second.tokens[0]]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_have_the_same_bits_whatever_is_beside_them(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """A prompt as a whole through the unsplit model, and in chunks beside others through a split one."""
    folder = make_checkpoint(family, tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(5, 250, (50,), generator=generator).tolist()
    pages, others = list(range(4)), [list(range(at, at + 4)) for at in (4, 8)]
    whole = Chain(folder, (0, 6), dtype=dtype, deterministic=True).step([Row(prompt, 0, pages, True)])
    chain = Chain(folder, (0, 2, 6), dtype=dtype, deterministic=True)
    for start, end in ((0, 17), (17, 18), (18, 49)):
        beside = [Row(prompt[:6], 0, own, True) for own in others]
        chain.step([*beside, Row(prompt[start:end], start, pages, False)])
    decode = [Row([7], 6, own, True) for own in others]
    split = chain.step([decode[0], Row(prompt[49:], 49, pages, True), decode[1]])
    assert torch.equal(split[1], whole[0])


def test_a_step_in_the_middle_of_a_prompt_has_no_logits(llama: Path, eager: bool) -> None:
    logits = Chain(llama, (0, 3, 6), enforce_eager=eager).step([Row([1, 2, 3], 0, [0], False)])
    assert logits.shape == (0, 260)


def test_a_nan_in_one_row_leaves_the_others_alone(llama: Path, eager: bool) -> None:
    chain = Chain(llama, (0, 3, 6), enforce_eager=eager)
    rows = [Row([5, 6, 7], 0, [3], True), Row([8], 0, [4], True), Row([9, 10], 0, [5], True)]
    clean = chain.step(rows)
    last = chain.shards[1]
    where = ([0, 0, 0], [3, 1, 2], [[3], [4], [5]], PAGE_SIZE)
    hidden = torch.randn(6, last.hidden_size)
    wanted = torch.tensor([2, 3, 5])

    def logits() -> torch.Tensor:
        return last.forward(StepBatch(*where, hidden=hidden, logit_rows=wanted))

    good = logits()
    hidden[1] = float("nan")
    bad = logits()
    assert bad[0].isnan().all()
    assert torch.equal(bad[1:], good[1:])
    # the pages that now hold NaN serve another sequence next
    chain.shards[0].forward(StepBatch(*where, token_ids=torch.tensor([5, 6, 7, 8, 9, 10])))
    assert torch.equal(chain.step(rows), clean)


def test_the_caller_is_called_between_layers(llama: Path, eager: bool) -> None:
    chain = Chain(llama, (0, 3, 6), enforce_eager=eager)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    chain.shards[1].on_layer = count
    chain.step([Row([1, 2, 3], 0, [0], True)])
    assert calls >= 2


def test_a_shard_says_what_a_step_lacks(llama: Path, eager: bool) -> None:
    chain = Chain(llama, (0, 3, 6), enforce_eager=eager)
    first, last = chain.shards
    where = ([0], [1], [[0]], PAGE_SIZE)
    token, hidden = torch.tensor([1]), torch.zeros(1, 64)
    with pytest.raises(InternalError, match="token ids"):
        first.forward(StepBatch(*where, hidden=hidden))
    with pytest.raises(InternalError, match="hidden states"):
        last.forward(StepBatch(*where, token_ids=token, logit_rows=token))
    with pytest.raises(InternalError, match="logits are wanted"):
        last.forward(StepBatch(*where, hidden=hidden))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_near_fp32(llama: Path, dtype: str, eager: bool) -> None:
    rows = [Row(list(range(30)), 0, [0, 1], True), Row(list(range(100, 120)), 0, [2, 3], True)]
    exact = Chain(llama, (0, 3, 6), enforce_eager=eager).step(rows)
    chain = Chain(llama, (0, 3, 6), dtype=dtype, enforce_eager=eager)
    assert chain.pools[0].dtype == chain.shards[0].dtype == getattr(torch, dtype)
    rough = chain.step(rows)
    assert torch.nn.functional.cosine_similarity(exact, rough).min() > 0.97


def test_the_pool_of_another_shard_does_not_fit(llama: Path, eager: bool) -> None:
    chain = Chain(llama, (0, 3, 6), enforce_eager=eager)
    pool = KvPool(chain.shards[1].kv_layers, 4, PAGE_SIZE, torch.float32, "cpu")
    with pytest.raises(InternalError, match=r"layers \[3, 4, 5\].*\[0, 1, 2\]"):
        chain.shards[0].bind_kv(pool)


def test_yarn_serves_beyond_the_positions_before_scaling(tmp_path: Path) -> None:
    """With factor 4, so that its limit is 1024 (tests/unit/test_checkpoint.py)."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    folder = make_checkpoint("llama", tmp_path, max_position_embeddings=256, rope_parameters=rope)
    prompts = clear_prompts(folder, [1000, 300], MAX_TOKENS)
    chain = Chain(folder, (0, 3, 6))
    assert chain.greedy([prompt.prompt_ids for prompt in prompts], MAX_TOKENS) == [prompt.tokens for prompt in prompts]
