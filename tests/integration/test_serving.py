"""What a user of a running mesh sees: OpenAI's own client, gRPC, cancellation, deadlines, bounds, single failures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from mesh import Mesh, serve

from stagemesh import Client
from stagemesh.errors import Cancelled, DeadlineExceeded, NotFound, NumericalError, QueueFull, Unauthenticated
from stagemesh.settings.model import DEMO_MODEL

QUESTION = [{"role": "user", "content": "What is seven plus five?"}]
KEY = "let-me-in"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with serve("-pp", "2", "--max-model-len", "1024") as running:
        yield running


def test_openais_client_gets_the_right_answer_streamed_and_not(mesh: Mesh) -> None:
    with openai.OpenAI(base_url=mesh.url + "/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
        assert "twelve" in (whole.choices[0].message.content or "").lower()
        assert whole.choices[0].finish_reason == "stop"
        chunks = list(
            client.chat.completions.create(
                model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage


def test_grpc_gives_what_http_gives(mesh: Mesh) -> None:
    async def ask() -> str:
        async with Client(mesh.grpc_address) as client:
            return (await client.generate(QUESTION, temperature=0, max_tokens=32)).text

    answer = mesh.post("/v1/chat/completions", {"model": mesh.model, "messages": QUESTION, "temperature": 0})
    assert asyncio.run(ask()) == answer["choices"][0]["message"]["content"]


def test_a_client_that_leaves_frees_its_pages(mesh: Mesh) -> None:
    # Enough to do that it is not over before anybody looks.
    body = {
        "model": mesh.model,
        "prompt": "one two three",
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
        "n": 16,
    }
    with httpx.stream("POST", mesh.url + "/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()  # One that nobody holds any more closes the connection.
        next(lines)
        assert mesh.get("/mesh")["gateway"]["running"] == 16
    mesh.check_pages_are_free()
    assert mesh.get("/mesh")["gateway"]["running"] == 0


def test_a_client_that_leaves_in_the_middle_of_a_prefill(mesh: Mesh) -> None:
    body = {"model": mesh.model, "prompt": [7] * 1000, "max_tokens": 8, "ignore_eos": True, "stream": True}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(mesh.url + "/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.02))
    mesh.check_pages_are_free()


def test_cancel_by_name(mesh: Mesh) -> None:
    async def story() -> None:
        async with Client(mesh.grpc_address) as client:
            stream = client.stream("one two", max_tokens=900, ignore_eos=True, request_id="mine")
            await anext(stream)
            await client.cancel("mine")
            with pytest.raises(Cancelled):
                [delta async for delta in stream]
            with pytest.raises(NotFound):
                await client.cancel("mine")

    asyncio.run(story())
    mesh.check_pages_are_free()


def test_a_deadline_ends_a_request(mesh: Mesh) -> None:
    async def story() -> None:
        async with Client(mesh.grpc_address) as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate("one two", max_tokens=1000, ignore_eos=True, timeout_s=0.05)

    asyncio.run(story())
    mesh.check_pages_are_free()


def test_choices_stops_and_logprobs(mesh: Mesh) -> None:
    request = {"model": mesh.model, "messages": QUESTION, "seed": 3, "temperature": 1.0, "n": 3, "max_tokens": 12}
    answer = mesh.post("/v1/chat/completions", {**request, "logprobs": True, "top_logprobs": 2})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice in answer["choices"]:
        for entry in choice["logprobs"]["content"]:
            assert entry["logprob"] <= 0
            assert len(entry["top_logprobs"]) == 2
    greedy = {"model": mesh.model, "messages": QUESTION, "temperature": 0}
    text = mesh.post("/v1/chat/completions", greedy)["choices"][0]["message"]["content"]
    stop = text[4:7]
    stopped = mesh.post("/v1/chat/completions", {**greedy, "stop": [stop]})["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_bubbles_and_requests_are_counted(mesh: Mesh) -> None:
    with urllib.request.urlopen(mesh.url + "/metrics", timeout=5) as response:
        text = response.read().decode()
    for name in ("num_requests_running", "time_to_first_token_seconds_count", "stage_seconds_total"):
        assert f"stagemesh_{name}" in text


def test_a_full_queue_says_when_to_come_back() -> None:
    with serve("--max-waiting", "2", "--max-num-seqs", "2", "--max-model-len", "1024") as mesh:

        async def story() -> list[Any]:
            async with Client(mesh.grpc_address) as client:
                requests = [client.generate("one", max_tokens=60, ignore_eos=True) for _ in range(12)]
                return await asyncio.gather(*requests, return_exceptions=True)

        endings = asyncio.run(story())
        refused = [e for e in endings if isinstance(e, QueueFull)]
        assert len(refused) == 12 - 4, endings
        assert all(e.retry_after_s and e.retry_after_s > 0 for e in refused)
        assert sum(not isinstance(e, BaseException) for e in endings) == 4, endings
        mesh.check_pages_are_free()


def test_an_api_key_is_asked_for() -> None:
    with serve("--api-key", KEY) as mesh:
        with pytest.raises(urllib.error.HTTPError) as refused:
            mesh.get("/v1/models")
        assert refused.value.code == 401
        refused.value.close()

        async def story() -> None:
            async with Client(mesh.grpc_address, api_key=KEY) as client:
                assert await client.models()
            async with Client(mesh.grpc_address, api_key="wrong") as client:
                with pytest.raises(Unauthenticated):
                    await client.models()

        asyncio.run(story())


def poisoned(target: Path, token: int) -> Path:
    """The shipped model with a NaN where one token is embedded (its head is untied, or every row would see it)."""
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in DEMO_MODEL.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    name = "model.embed_tokens.weight"
    if config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = tensors[name].clone()
        (target / "config.json").write_text(json.dumps(config))
    tensors[name][token] = torch.nan
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_nan_fails_its_own_request_alone(tmp_path: Path) -> None:
    with serve(str(poisoned(tmp_path / "model", 77)), "-pp", "2") as mesh:

        async def story() -> list[Any]:
            async with Client(mesh.grpc_address) as client:
                sane = [client.generate([9, 10, 11], max_tokens=40, temperature=0, ignore_eos=True) for _ in range(4)]
                sick = client.generate([9, 77, 11], max_tokens=40, temperature=0, ignore_eos=True)
                later = await asyncio.gather(*sane, sick, return_exceptions=True)
                alone = await client.generate([9, 10, 11], max_tokens=40, temperature=0, ignore_eos=True)
                return [*later, alone]

        *sane, sick, alone = asyncio.run(story())
        assert isinstance(sick, NumericalError), sick
        assert all(done.token_ids == alone.token_ids for done in sane)
        mesh.check_pages_are_free()


def test_a_service_on_sigterm_finishes_what_it_holds() -> None:
    with serve("--drain-timeout", "20", "--max-model-len", "1024") as mesh:

        async def story() -> int:
            async with Client(mesh.grpc_address) as client:
                tokens = 0
                async for delta in client.stream("one", max_tokens=100, temperature=0, ignore_eos=True):
                    if not tokens:
                        (gateway,) = mesh.named("stagemesh gateway")
                        gateway.send_signal(signal.SIGTERM)
                    tokens += len(delta.token_ids)
                return tokens

        assert asyncio.run(story()) == 100
        mesh.wait_ready()
