"""What a request gets that leaves a parameter out: the checkpoint's generation_config.json decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.stage_worker.sampling.sampler import SequenceSampler, sample

Make = Callable[..., Any]
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {COMPLETION: {"prompt": "abc"}, CHAT: {"messages": [{"role": "user", "content": "abc"}]}}
VOCAB = 300


@pytest.fixture
def make(make_served: Make, byte_level_dir: Path) -> Make:
    """Makes fronts over an engine whose checkpoint has this generation_config.json."""

    def made(**told: Any) -> Any:
        (byte_level_dir / "generation_config.json").write_text(json.dumps(told))
        return make_served(byte_level_dir, max_model_len=64)

    return made


def post(served: Any, path: str, **more: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.post(path, json={**BODY[path], **more})

    return asyncio.run(go())


def sampling(served: Any, **more: Any) -> types_pb2.SamplingParams:
    """What the last stage is told for a request with these parameters."""
    assert post(served, COMPLETION, max_tokens=1, **more).status_code == 200
    told: types_pb2.SamplingParams = served.engine.requests[-1].sampling
    return told


def drawn(params: types_pb2.SamplingParams) -> tuple[set[int], int]:
    """Tokens of 64 positions over one distribution that is nearly flat, and the likeliest one."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 0.01
    opened = stage_pb2.OpenSequence(sampling=params, prompt=[1])
    state = SequenceSampler.open(opened, VOCAB, torch.device("cpu"))
    return {sample(logits, [state], [i]).tokens[0] for i in range(64)}, int(logits.argmax())


def test_top_p_of_0_leaves_the_likeliest_token(make: Make) -> None:
    tokens, likeliest = drawn(sampling(make(top_p=0, temperature=1.0)))
    assert tokens == {likeliest}


def test_a_requests_own_top_p_overrides_it(make: Make) -> None:
    tokens, _ = drawn(sampling(make(top_p=0, temperature=1.0), top_p=1))
    assert len(tokens) > 30


def test_a_top_p_that_32_bits_round_to_0_leaves_the_likeliest_token(make: Make) -> None:
    tokens, likeliest = drawn(sampling(make(), top_p=1e-60, temperature=1.0))
    assert tokens == {likeliest}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 10**6}, {"top_k": 0}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"min_p": 0.5}, {"min_p": 0.5}),
        ({"repetition_penalty": 0.5}, {"repetition_penalty": 0.5}),
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
    ],
)
def test_defaults_of_sampling(make: Make, told: dict[str, Any], expected: dict[str, float]) -> None:
    got = sampling(make(**told))
    assert {name: getattr(got, name) for name in expected} == expected


def test_a_requests_own_0_overrides_a_default(make: Make) -> None:
    got = sampling(make(temperature=0.7, top_k=5, min_p=0.5), temperature=0, top_k=0, min_p=0)
    assert (got.temperature, got.top_k, got.min_p) == (0.0, 0, 0.0)


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
@pytest.mark.parametrize(("most", "expected"), [(7, 7), (1, 1), (20, 20), (10**9, None)])
def test_max_new_tokens_is_the_default_of_max_tokens(make: Make, path: str, most: int, expected: int | None) -> None:
    usage = post(make(max_new_tokens=most), path).json()["usage"]
    assert usage["completion_tokens"] == (64 - usage["prompt_tokens"] if expected is None else expected)


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_a_requests_own_max_tokens_overrides_it(make: Make, path: str) -> None:
    served = make(max_new_tokens=7, max_length=3)
    assert post(served, path, max_tokens=9).json()["usage"]["completion_tokens"] == 9
