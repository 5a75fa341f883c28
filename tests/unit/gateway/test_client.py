"""The client library against the gRPC front, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest

from stagemesh import errors, rpc
from stagemesh.client import Client, Completion, StreamDelta
from stagemesh.protos.v1 import gateway_pb2, gateway_pb2_grpc

Make = Callable[..., Any]


def talk(served: Any, what: Callable[[Client], Awaitable[Any]], api_key: str | None = None) -> Any:
    async def go() -> Any:
        async with served.grpc() as address, Client(address, api_key) as client:
            return await asyncio.wait_for(what(client), 60)

    return asyncio.run(go())


def test_generate(make_served: Make) -> None:
    done: Completion = talk(make_served(), lambda c: c.generate("abc", max_tokens=5, n=2, logprobs=2))
    assert (done.text, done.finish_reason) == ("abcab", "length")
    assert [choice.text for choice in done.choices] == ["abcab", "bcabc"]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 10)
    assert len(done.token_ids) == len(done.choices[0].logprobs) == 5
    first = done.choices[0].logprobs[0]
    assert (first.token_id, first.logprob, first.top) == (done.token_ids[0], -1.0, {done.token_ids[0]: -1.0, 3: -2.0})


def test_every_kind_of_prompt(make_served: Make) -> None:
    served = make_served()
    assert talk(served, lambda c: c.generate([70, 71], max_tokens=3)).token_ids == [70, 71, 70]
    assert talk(served, lambda c: c.generate([{"role": "user", "content": "Hi"}], max_tokens=8)).text == "[user]Hi"
    chat = talk(served, lambda c: c.generate([{"role": "user", "content": "Hi"}]))
    assert chat.usage.prompt_tokens + chat.usage.completion_tokens == 256, "a chat may fill the context"
    for role in ("developer", "system"):
        talk(served, lambda c, role=role: c.generate([{"role": role, "content": "Hi"}], max_tokens=1))
    assert served.engine.requests[-2].prompt == served.engine.requests[-1].prompt
    with pytest.raises(errors.InvalidRequest, match=r"messages\[0\]\.role must be"):
        talk(served, lambda c: c.generate([{"role": "tool", "content": "Hi"}]))


def test_params_reach_the_engine(make_served: Make) -> None:
    served = make_served()
    asked: Any = {
        "model": "echo",
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "presence_penalty": -1.5,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.25,
        "seed": 2**64 - 1,
        "stop": "zz",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 4,
        "timeout_s": 7.5,
        "request_id": "mine",
    }
    assert talk(served, lambda c: c.generate("ab", **asked)).request_id == "mine"
    request = served.engine.requests[0]
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (0.0, 0.5, 7, 0.25, 2**64 - 1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (-1.5, 2.0, 1.25)
    assert (request.stop, request.stop_token_ids, s.min_tokens) == (("zz",), {9}, 2)
    assert 1 < request.deadline_s <= 7.5
    talk(served, lambda c: c.generate("ab"))
    assert served.engine.requests[1].sampling.temperature == 0.5, "the default of generation_config.json"


def test_stream_and_leaving_it(make_served: Make) -> None:
    served = make_served()

    async def go(client: Client) -> None:
        deltas: list[StreamDelta] = [d async for d in client.stream("abc", max_tokens=5)]
        assert "".join(d.text for d in deltas) == "abcab"
        assert [d.finish_reason for d in deltas] == [None] * 4 + ["length"]
        served.engine.gate = asyncio.Semaphore(2)
        stream = client.stream("abc", max_tokens=50, request_id="left")
        async for _ in stream:
            break
        await stream.aclose()
        await served.engine.until(lambda: "left" in served.engine.cancelled)

    talk(served, go)


def test_cancelling_the_task_cancels_the_request(make_served: Make) -> None:
    served = make_served()

    async def go(client: Client) -> None:
        served.engine.gate = asyncio.Semaphore(2)
        task = asyncio.create_task(client.generate("abc", max_tokens=50, request_id="task"))
        await served.engine.until(lambda: "task" in served.engine.running)
        task.cancel()
        await served.engine.until(lambda: "task" in served.engine.cancelled)

    talk(served, go)


def test_cancel_by_name(make_served: Make) -> None:
    served = make_served()

    async def go(client: Client) -> None:
        served.engine.gate = asyncio.Semaphore(2)
        task = asyncio.create_task(client.generate("abc", max_tokens=50, request_id="named"))
        await served.engine.until(lambda: "named" in served.engine.running)
        await client.cancel("named")
        with pytest.raises(errors.Cancelled):
            await task
        with pytest.raises(errors.NotFound, match="named"):
            await client.cancel("named")

    talk(served, go)


def test_models_and_mesh(make_served: Make) -> None:
    served = make_served()
    (model,) = talk(served, lambda c: c.models())
    assert (model.id, model.max_model_len) == ("echo", 256)
    mesh = talk(served, lambda c: c.mesh())
    assert mesh["mesh"]["pipelines"][0]["pipeline_id"] == "p0"
    assert (mesh["free_pages"], mesh["total_pages"], mesh["waiting"]) == (7, 9, 0)
    served.engine.away = "loading"
    assert talk(served, lambda c: c.models()) == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.QueueFull("full", retry_after_s=2.5), errors.QueueFull),
        (errors.StageLost("stage 1 went away"), errors.StageLost),
        (errors.DeadlineExceeded("too late"), errors.DeadlineExceeded),
        (errors.NumericalError("NaN"), errors.NumericalError),
    ],
)
@pytest.mark.parametrize("at", [None, 0, 2])
def test_failures_arrive_as_they_were_raised(make_served: Make, error: Any, kind: type, at: int | None) -> None:
    served = make_served()
    if at is None:
        served.engine.refuse = error
    else:
        served.engine.fail_at = (at, error)
    with pytest.raises(kind) as caught:
        talk(served, lambda c: c.generate("abc"))
    assert type(caught.value) is kind
    assert caught.value.message == error.message
    assert caught.value.retry_after_s == error.retry_after_s
    assert not served.engine.running


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "message"),
    [
        ("", {}, errors.InvalidRequest, "prompt is empty"),
        ([], {}, errors.InvalidRequest, "prompt is empty"),
        ([300], {}, errors.InvalidRequest, "outside the vocabulary"),
        ([-1], {}, errors.InvalidRequest, "cannot be sent"),
        ("a\ud800", {}, errors.InvalidRequest, "cannot be sent"),
        ("x" * 300, {}, errors.PromptTooLong, "maximum context length is 256"),
        ("a", {"max_tokens": 0}, errors.InvalidRequest, "max_tokens must be at least 1"),
        ("a", {"max_tokens": -1}, errors.InvalidRequest, "cannot be sent"),
        ("a", {"max_tokens": 4000}, errors.PromptTooLong, "asks for 4000"),
        ("a", {"temperature": "hot"}, errors.InvalidRequest, "cannot be sent"),
        ("a", {"temperature": float("nan")}, errors.InvalidRequest, "temperature must be"),
        ("a", {"temperature": float("inf")}, errors.InvalidRequest, "temperature must be"),
        ("a", {"tempereture": 1}, errors.InvalidRequest, "cannot be sent"),
        ("a", {"n": 1000}, errors.InvalidRequest, "n must be"),
        ("a", {"timeout_s": -1}, errors.InvalidRequest, "timeout_s must be"),
        ("a", {"model": "other"}, errors.NotFound, "'other' does not exist"),
        ("a", {"request_id": "x" * 200}, errors.InvalidRequest, "at most 128"),
        ([{"role": "tool", "content": "x"}], {}, errors.InvalidRequest, "not 'tool'"),
        ([{"role": "assistant", "content": "x"}], {}, errors.InvalidRequest, "must not begin"),
        ([{"role": "user", "kontent": "x"}], {}, errors.InvalidRequest, "cannot be sent"),
    ],
)
def test_bad_input(make_served: Make, prompt: Any, params: Any, kind: type, message: str) -> None:
    served = make_served()
    with pytest.raises(kind, match=message) as caught:
        talk(served, lambda c: c.generate(prompt, **params))
    assert type(caught.value) is kind
    assert not served.engine.requests


def test_the_api_key(make_served: Make) -> None:
    served = make_served(api_key="key")
    assert talk(served, lambda c: c.generate("a", max_tokens=1), api_key="key").text == "a"
    for wrong in (None, "other"):
        for call in (lambda c: c.generate("a"), lambda c: c.models(), lambda c: c.mesh(), lambda c: c.cancel("x")):
            with pytest.raises(errors.Unauthenticated):
                talk(served, call, api_key=wrong)


def test_a_gateway_that_is_not_there() -> None:
    async def go() -> None:
        async with Client("127.0.0.1:1") as client:
            with pytest.raises(errors.Unavailable):
                await client.models()
            with pytest.raises(errors.Unavailable):
                await client.generate("a")

    asyncio.run(go())


def test_the_channels_own_deadline_reaches_the_engine(make_served: Make) -> None:
    served = make_served()

    async def go() -> None:
        async with served.grpc() as address, rpc.channel(address) as channel:
            stub: Any = gateway_pb2_grpc.GatewayStub(channel)
            call = stub.Generate(gateway_pb2.GenerateRequest(text="a", max_tokens=1), timeout=30)
            responses = [r async for r in call]
            assert responses[-1].usage.completion_tokens == 1
            assert 0 < served.engine.requests[0].deadline_s <= 31  # gRPC rounds up
            served.engine.gate = asyncio.Semaphore(0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(gateway_pb2.GenerateRequest(text="a"), timeout=0.3).read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await served.engine.until(lambda: not served.engine.running)

    asyncio.run(go())


def test_a_grpc_reader_that_does_not_read_and_goes_away(make_served: Make) -> None:
    """The engine is not drained into a buffer, and the request ends though its messages wait for the reader."""
    served = make_served(max_model_len=200_000)

    async def go() -> None:
        async with served.grpc() as address, rpc.channel(address) as channel:
            stub: Any = gateway_pb2_grpc.GatewayStub(channel)
            ask = gateway_pb2.GenerateRequest(text="abc", max_tokens=150_000, request_id="x" * 128, logprobs=4)
            call = stub.Generate(ask)
            await call.read()
            (stream,) = served.engine.running.values()
            seen = -1
            async with asyncio.timeout(60):
                while seen != stream.batches:
                    seen = stream.batches
                    await asyncio.sleep(0.5)
            # What HTTP/2 windows of some 5 MB hold of messages of 200 bytes.
            assert 1 < seen < 75_000
            call.cancel()
            await served.engine.until(lambda: not served.engine.running)

    asyncio.run(go())
