"""The HTTP API as clients see it: answers, streams, and what cannot be answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from stagemesh import errors

Make = Callable[..., Any]
Parse = Callable[..., list[Any]]
URL = "/v1/completions"
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def client(served: Any, **kwargs: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway", **kwargs) as c:
        yield c


def post(served: Any, path: str, body: Any, **kwargs: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(served) as c:
            if isinstance(body, bytes):
                return await c.post(path, content=body, **kwargs)
            return await c.post(path, json=body, **kwargs)

    return asyncio.run(go())


def get(served: Any, path: str, **kwargs: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with client(served) as c:
            return await c.get(path, **kwargs)

    return asyncio.run(go())


def test_a_completion(make_served: Make) -> None:
    served = make_served()
    answer = post(served, URL, {"model": "echo", "prompt": "abc", "max_tokens": 5}).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    # The prompt is <s>, a, b, c.
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    request = served.engine.requests[0]
    assert request.sampling.temperature == 0.5, "the default of generation_config.json"
    assert request.stop_token_ids == {1, 2}
    assert not served.engine.running


def test_a_streamed_completion_is_the_whole_one_in_pieces(make_served: Make, events: Parse) -> None:
    served = make_served()
    body = {"prompt": "héllo 🙂", "max_tokens": 30, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = post(served, URL, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response.text.splitlines())
    assert got[-1] == "[DONE]"
    assert got[-2]["choices"] == []
    whole = post(served, URL, {**body, "stream": False, "stream_options": None}).json()
    assert got[-2]["usage"] == whole["usage"]
    assert all(e["usage"] is None for e in got[:-2])
    for choice in whole["choices"]:
        own = [c for e in got[:-2] for c in e["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own][-1] == "length"
        assert all(c["finish_reason"] is None for c in own[:-1])


def test_usage_goes_along_with_every_chunk_where_asked_for(make_served: Make, events: Parse) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "abc", "max_tokens": 3, "stream": True, "stream_options": options}
    got = events(post(make_served(), URL, body).text.splitlines())
    assert [e["usage"]["completion_tokens"] for e in got[:-1]] == [1, 2, 3, 3]


def test_several_prompts_are_indexed_like_openai(make_served: Make, events: Parse) -> None:
    served = make_served()
    body = {"prompt": ["ab", "cd", "ef"], "n": 2, "max_tokens": 2, "echo": True}
    answer = post(served, URL, body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [c["text"] for c in answer["choices"]] == ["abab", "abba", "cdcd", "cddc", "efef", "effe"]
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 12,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    got = events(post(served, URL, {**body, "stream": True}).text.splitlines())
    streamed = [""] * 6
    for event in got[:-1]:
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [c["text"] for c in answer["choices"]]


@pytest.mark.parametrize("prompt", [[70, 71, 72], [[70, 71, 72]]])
def test_token_ids_as_a_prompt(make_served: Make, prompt: Any) -> None:
    served = make_served()
    answer = post(served, URL, {"prompt": prompt, "max_tokens": 4, "return_token_ids": True}).json()
    assert served.engine.requests[0].prompt == (70, 71, 72)
    assert answer["choices"][0]["token_ids"] == [70, 71, 72, 70]
    assert answer["choices"][0]["prompt_token_ids"] == [70, 71, 72]


def test_a_chat(make_served: Make, events: Parse) -> None:
    served = make_served()
    body = {
        "model": "echo",
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
        ],
        "max_completion_tokens": 12,
    }
    answer = post(served, CHAT, body).json()
    expected = "[system]Be kind.[user]Hi\nyou[assistant]"
    tokenizer = served.engine.tokenizer
    assert served.engine.requests[0].prompt == (0, *tokenizer.encode(expected, add_special_tokens=False))
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected[:12], "refusal": None}
    assert choice["finish_reason"] == "length"
    got = events(post(served, CHAT, {**body, "stream": True}).text.splitlines())
    assert got[0]["object"] == "chat.completion.chunk"
    assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got[:-1]) == expected[:12]
    assert got[-2]["choices"][0]["finish_reason"] == "length"
    assert got[-1] == "[DONE]"


def test_defaults_of_max_tokens(make_served: Make) -> None:
    served = make_served(max_model_len=64)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    answer = post(served, CHAT, chat).json()
    assert answer["usage"]["total_tokens"] == 64
    assert post(served, URL, {"prompt": "a"}).json()["usage"]["completion_tokens"] == 16
    assert post(served, URL, {"prompt": [5] * 60}).json()["usage"]["completion_tokens"] == 4


def test_stops(make_served: Make) -> None:
    served = make_served()

    def one(**kwargs: Any) -> tuple[Any, ...]:
        choice = post(served, URL, {"prompt": "abcdef", "max_tokens": 9, **kwargs}).json()["choices"][0]
        return choice["text"], choice["finish_reason"], choice["stop_reason"]

    assert one() == ("abcdefabc", "length", None)
    assert one(stop="de") == ("abc", "stop", "de")
    assert one(stop=["x", "cd"], include_stop_str_in_output=True) == ("abcd", "stop", "cd")
    c = served.engine.tokenizer.encode("c", add_special_tokens=False)[0]
    assert one(stop_token_ids=[c]) == ("ab", "stop", c)
    assert one(stop="bc", min_tokens=4) == ("abcdefa", "stop", "bc")
    # The prompt is <s> a </s>.
    assert one(prompt="a</s>") == ("a", "stop", None)
    assert one(prompt="a</s>", ignore_eos=True, max_tokens=4) == ("aa", "length", None)
    assert one(prompt="a</s>", ignore_eos=True, max_tokens=4, skip_special_tokens=False)[0] == "a</s>a</s>"


def test_everything_that_may_be_asked_for_reaches_the_engine(make_served: Make) -> None:
    served = make_served(request_timeout=100)
    asked = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": -1.5,
        "frequency_penalty": 2,
        "repetition_penalty": 1.25,
        "seed": -1,
        "n": 3,
        "best_of": 3,
        "logit_bias": {"5": -100, "9": 1.5},
        "min_tokens": 2,
        "max_tokens": 4,
        "timeout": 7.5,
        "logprobs": 2,
        "user": "ignored",
        "no_such_key": {"ignored": True},
        "suppressed_ids": ["ignored"],
    }
    assert post(served, URL, {"prompt": "ab", **asked}).status_code == 200
    request = served.engine.requests[0]
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.0, 0.5, 7, 0.125)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (-1.5, 2.0, 1.25)
    assert (s.seed, s.logprobs, s.top_logprobs) == (2**64 - 1, True, 2)
    assert (list(s.bias_ids), list(s.bias_values)) == ([5, 9], [-100.0, 1.5])
    assert (request.n, s.min_tokens, request.max_tokens, request.deadline_s) == (3, 2, 4, 7.5)
    post(served, URL, {"prompt": "ab", "timeout": 1e9, "top_k": -1})
    assert served.engine.requests[1].deadline_s == 100
    assert served.engine.requests[1].sampling.top_k == 0


def test_logprobs_of_completions(make_served: Make, events: Parse) -> None:
    served = make_served()
    body = {"prompt": "aé", "max_tokens": 4, "logprobs": 2}
    choice = post(served, URL, body).json()["choices"][0]
    assert choice["text"] == "aéa"
    told = choice["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "a"]
    assert told["token_logprobs"] == [-1.0] * 4
    assert told["text_offset"] == [0, 1, 1, 2]
    assert told["top_logprobs"][0] == {"a": -1.0, "!": -2.0}
    got = events(post(served, URL, {**body, "stream": True}).text.splitlines())
    pieces = [e["choices"][0]["logprobs"] for e in got[:-1]]
    for key in told:
        assert [x for piece in pieces for x in piece[key]] == told[key]


def test_logprobs_of_chats(make_served: Make) -> None:
    body = {"messages": [{"role": "user", "content": "é"}], "max_tokens": 8, "logprobs": True, "top_logprobs": 1}
    choice = post(make_served(), CHAT, body).json()["choices"][0]
    assert choice["logprobs"]["content"][0] == {
        "token": "[",
        "logprob": -1.0,
        "bytes": [0x5B],
        "top_logprobs": [{"token": "[", "logprob": -1.0, "bytes": [0x5B]}],
    }
    assert choice["logprobs"]["content"][6]["bytes"] == [0xC3]


BAD: list[tuple[str, dict[str, Any], str, str | None]] = [
    # (endpoint, body, part of the message, param)
    (URL, {}, "prompt is empty", "prompt"),
    (URL, {"prompt": ""}, "prompt is empty", "prompt"),
    (URL, {"prompt": []}, "prompt is empty", "prompt"),
    (URL, {"prompt": [[]]}, "prompt is empty", "prompt"),
    (URL, {"prompt": ["a", ""]}, "prompt is empty", "prompt"),
    (URL, {"prompt": ["a", 1]}, "prompt must be a string, a list", "prompt"),
    (URL, {"prompt": [1.5]}, "prompt must be a string, a list", "prompt"),
    (URL, {"prompt": [True]}, "prompt must be a string, a list", "prompt"),
    (URL, {"prompt": {"a": 1}}, "prompt must be a string, a list", "prompt"),
    (URL, {"prompt": [5, 300]}, "token id 300, which is outside the vocabulary (0 to 299)", "prompt"),
    (URL, {"prompt": [-1, 5]}, "token id -1, which is outside", "prompt"),
    (URL, {"prompt": [10**30]}, "outside the vocabulary", "prompt"),
    (URL, {"prompt": [5] * 256}, "maximum context length is 256 tokens, but the prompt has 256", "prompt"),
    (URL, {"prompt": "x" * 300}, "maximum context length is 256 tokens, but the prompt has 301", "prompt"),
    (URL, {"prompt": "x" * 5_000_000}, "256 tokens, but the prompt has at least", "prompt"),
    (URL, {"prompt": "abc", "max_tokens": 253}, "has 4 tokens and max_tokens asks for 253: 257", "max_tokens"),
    (URL, {"prompt": "a", "max_tokens": 10**18}, "asks for 1000000000000000000", "max_tokens"),
    (URL, {"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, not 0", "max_tokens"),
    (URL, {"prompt": "a", "max_tokens": -5}, "max_tokens must be at least 1, not -5", "max_tokens"),
    (URL, {"prompt": "a", "max_tokens": 1.5}, "valid integer", "max_tokens"),
    (URL, {"prompt": "a", "max_tokens": "5"}, "valid integer, not '5'", "max_tokens"),
    (URL, {"prompt": "a", "min_tokens": 17}, "min_tokens must be at least 0 and at most 16", "min_tokens"),
    (URL, {"prompt": "a", "temperature": "hot"}, "valid number, not 'hot'", "temperature"),
    (URL, {"prompt": "a", "temperature": -0.5}, "temperature must be at least 0, not -0.5", "temperature"),
    (URL, {"prompt": "a", "top_p": 0}, "top_p must be more than 0 and at most 1", "top_p"),
    (URL, {"prompt": "a", "top_p": 1.1}, "top_p must be more than 0 and at most 1, not 1.1", "top_p"),
    (URL, {"prompt": "a", "top_k": -2}, "top_k must be at least -1", "top_k"),
    (URL, {"prompt": "a", "min_p": 2}, "min_p must be at least 0 and at most 1", "min_p"),
    (URL, {"prompt": "a", "presence_penalty": 2.5}, "presence_penalty must be", "presence_penalty"),
    (URL, {"prompt": "a", "frequency_penalty": -3}, "frequency_penalty must be", "frequency_penalty"),
    (URL, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be more than 0", "repetition_penalty"),
    (URL, {"prompt": "a", "seed": 2**64}, "seed must be", "seed"),
    (URL, {"prompt": "a", "n": 0}, "n must be at least 1", "n"),
    (URL, {"prompt": "a", "n": 129}, "n must be at least 1 and at most 128", "n"),
    (URL, {"prompt": "a", "n": True}, "valid integer", "n"),
    (URL, {"prompt": "a", "best_of": 2}, "best_of must equal n here (1), not 2", "best_of"),
    (URL, {"prompt": "a", "logprobs": 21}, "logprobs must be at least 0 and at most 20", "logprobs"),
    (URL, {"prompt": "a", "logprobs": True}, "valid integer", "logprobs"),
    (URL, {"prompt": "a", "stop": ["x"] * 17}, "at most 16 strings", "stop"),
    (URL, {"prompt": "a", "stop": [""]}, "must not hold an empty string", "stop"),
    (URL, {"prompt": "a", "stop": 5}, "a string or a list of strings", "stop"),
    (URL, {"prompt": "a", "stop": ["x", 5]}, "a string or a list of strings", "stop"),
    (URL, {"prompt": "a", "stop": "x" * 2000}, "at most 1024 characters", "stop"),
    (URL, {"prompt": "a", "stop_token_ids": [300]}, "stop_token_ids must be", "stop_token_ids"),
    (URL, {"prompt": "a", "logit_bias": {"x": 1}}, "'x' is not a token id", "logit_bias"),
    (URL, {"prompt": "a", "logit_bias": {"5": 101}}, "at most 100", "logit_bias"),
    (URL, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias must be", "logit_bias"),
    (URL, {"prompt": "a", "timeout": 0}, "timeout must be more than 0", "timeout"),
    (URL, {"prompt": "a", "timeout": -1}, "timeout must be more than 0", "timeout"),
    (URL, {"prompt": "a", "stream": "yes"}, "valid boolean", "stream"),
    (URL, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream is true", "stream_options"),
    (URL, {"prompt": "a", "suffix": "b"}, "not supported", "suffix"),
    (URL, {"prompt": "a", "echo": True, "logprobs": 1}, "echo with logprobs", "echo"),
    (URL, {"prompt": "a", "guided_json": {"type": "object"}}, "not supported", "guided_json"),
    (URL, {"prompt": "a", "response_format": {"type": "json_object"}}, "only 'text' is", "response_format"),
    (CHAT, {}, "'messages' is required", "messages"),
    (CHAT, {"messages": []}, "at least one message", "messages"),
    (CHAT, {"messages": "hi"}, "valid array, not 'hi'", "messages"),
    (CHAT, {"messages": [{"content": "hi"}]}, "'messages[0].role' is required", "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "must be a string or a list", "messages[0].content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "not 'tool'", "messages[0].role"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, "the assistant must not begin", "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "must be a part of type 'text', not 'image_url'",
        "messages[0].content[0]",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}, "maximum context length is 256", "prompt"),
]
HELLO = {"messages": [{"role": "user", "content": "hi"}]}
BAD += [
    (CHAT, {**HELLO, "tools": [{"type": "function"}]}, "tools are not supported", "tools"),
    (CHAT, {**HELLO, "tool_choice": "required"}, "tools are not supported", "tool_choice"),
    (CHAT, {**HELLO, "response_format": {"type": "json_schema", "json_schema": {}}}, "only 'text'", "response_format"),
    (CHAT, {**HELLO, "top_logprobs": 2}, "needs logprobs", "top_logprobs"),
    (CHAT, {**HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs must be", "top_logprobs"),
    (CHAT, {**HELLO, "logprobs": 1}, "valid boolean", "logprobs"),
    (CHAT, {**HELLO, "modalities": ["text", "audio"]}, "only modality", "modalities"),
    (CHAT, {**HELLO, "max_completion_tokens": -1}, "max_completion_tokens must be", "max_completion_tokens"),
    (CHAT, {**HELLO, "max_completion_tokens": 999}, "max_completion_tokens asks for 999", "max_completion_tokens"),
    (CHAT, {**HELLO, "chat_template": "{{ 1 }}"}, "the checkpoint's own is used", "chat_template"),
]


@pytest.mark.parametrize(("path", "body", "message", "param"), BAD, ids=lambda v: str(v)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input(
    make_served: Make, path: str, body: dict[str, Any], message: str, param: str | None, stream: bool
) -> None:
    served = make_served()
    if stream and ("stream" in body or "stream_options" in body):
        return
    response = post(served, path, {**body, "stream": True} if stream else body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert not served.engine.requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "finite number"),
        (b'{"prompt": "a", "temperature": Infinity}', "finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', "finite number"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", ""),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'["a list"]', "must be a JSON object"),
        (b'"a string"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
    ids=lambda v: str(v[:40]),
)
def test_bodies_that_are_no_request(make_served: Make, body: bytes, message: str) -> None:
    response = post(make_served(), URL, body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_content_type_does_not_matter(make_served: Make) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = post(make_served(), URL, b'{"prompt": "a"}', headers={"content-type": content_type})
        assert response.status_code == 200


def test_an_unknown_model_is_a_404(make_served: Make) -> None:
    response = post(make_served(), URL, {"model": "gpt-9", "prompt": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'gpt-9' does not exist; this server has 'echo'" in response.json()["error"]["message"]


def test_a_checkpoint_without_chat_template_says_so(
    make_served: Make, make_byte_level: Callable[..., Path], tmp_path: Path
) -> None:
    served = make_served(make_byte_level(tmp_path / "base", chat_template=None))
    response = post(served, CHAT, HELLO)
    assert response.status_code == 400
    assert "has no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (errors.QueueFull("full", retry_after_s=2.5), 429, "rate_limit_exceeded", "3"),
        (errors.Unavailable("no pipeline"), 503, "unavailable", "1"),
        (errors.StageLost("stage 1 went away", retry_after_s=1), 503, "stage_lost", "1"),
        (errors.DeadlineExceeded("too late"), 504, "deadline_exceeded", None),
        (errors.NumericalError("NaN"), 500, "numerical", None),
        (errors.PromptTooLong("does not fit"), 400, "context_length_exceeded", None),
    ],
)
@pytest.mark.parametrize("when", ["submit", "first", "stream first"])
def test_failures_before_the_first_byte_have_their_status(
    make_served: Make, error: errors.StagemeshError, status: int, code: str, retry: str | None, when: str
) -> None:
    served = make_served()
    if when == "submit":
        served.engine.refuse = error
    else:
        served.engine.fail_at = (0, error)
    response = post(served, URL, {"prompt": "ab", "stream": when == "stream first"})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == error.message
    assert response.headers.get("retry-after") == retry
    assert not served.engine.running


def test_a_failure_in_mid_stream_ends_it_with_the_error(make_served: Make, events: Parse) -> None:
    served = make_served()
    served.engine.fail_at = (2, errors.StageLost("stage 1 went away", retry_after_s=1))
    response = post(served, CHAT, {**HELLO, "stream": True})
    assert response.status_code == 200
    got = events(response.text.splitlines())
    assert got[-1]["error"]["code"] == "stage_lost"
    assert got[-1]["error"]["message"] == "stage 1 went away"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in got[:-1]) == "[u"
    assert not served.engine.running


def test_a_failure_of_the_second_prompt_ends_the_first(make_served: Make) -> None:
    served = make_served()
    submit = served.engine.submit

    def one_only(request: Any) -> Any:
        if served.engine.requests:
            raise errors.QueueFull("full", retry_after_s=1)
        return submit(request)

    served.engine.submit = one_only
    assert post(served, URL, {"prompt": ["a", "b"]}).status_code == 429
    assert served.engine.cancelled == [served.engine.requests[0].request_id]


def test_while_no_model_is_served(make_served: Make) -> None:
    served = make_served()
    served.engine.away = "stage 1 loads its weights"
    for path in ("/health", "/readyz"):
        response = get(served, path)
        assert response.status_code == 503
        assert response.json()["reason"] == "stage 1 loads its weights"
    response = post(served, URL, {"prompt": "a"})
    assert response.status_code == 503
    assert "stage 1 loads its weights" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) >= 1
    assert get(served, "/livez").status_code == 200
    assert get(served, "/v1/models").json()["data"] == []
    served.engine.away = ""
    assert get(served, "/health").status_code == get(served, "/readyz").status_code == 200


def test_what_operators_look_at(make_served: Make) -> None:
    served = make_served()
    assert get(served, "/v1/models").json()["data"][0]["id"] == "echo"
    card = get(served, "/v1/models/echo").json()
    assert (card["object"], card["max_model_len"], card["owned_by"]) == ("model", 256, "stagemesh")
    assert get(served, "/v1/models/other").status_code == 404
    assert get(served, "/mesh").json()["gateway"]["total_pages"] == 9
    assert get(served, "/version").json()["version"]
    for path, method, status in (("/nope", "GET", 404), (URL, "GET", 405), ("/health", "DELETE", 405)):
        transport = httpx.ASGITransport(served.app)

        async def ask(transport: Any = transport, path: str = path, method: str = method) -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as c:
                return await c.request(method, path)

        response = asyncio.run(ask())
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_metrics(make_served: Make) -> None:
    served = make_served()
    served.metrics.success.labels("stop").inc()
    served.metrics.generation_tokens.inc(5)
    for interval_s in (0.1, 0.2):
        served.metrics.itl_s.observe(interval_s)
    post(served, URL, {"prompt": "a", "model": "nope"})
    text = get(served, "/metrics").text
    for line in (
        'stagemesh_request_success_total{finished_reason="stop"} 1.0',
        "stagemesh_generation_tokens_total 5.0",
        "stagemesh_inter_token_latency_seconds_count 2.0",
        "stagemesh_num_requests_running 0.0",
        "stagemesh_num_requests_waiting 0.0",
        "stagemesh_kv_cache_usage_perc 0.0",
        "stagemesh_num_preemptions_total 0.0",
        'stagemesh_http_requests_total{handler="/v1/completions",method="POST",status="404"} 1.0',
    ):
        assert line in text.splitlines()
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "prompt_tokens_total"):
        assert f"stagemesh_{name}" in text


def test_the_api_key(make_served: Make) -> None:
    served = make_served(api_key="sésame")
    ask = {"prompt": "a"}
    for header in (None, "Bearer wrong", "Bearer ", "Basic sésame", "sésame", "Bearer sésame2"):
        headers = {} if header is None else {"authorization": header.encode()}
        response = post(served, URL, ask, headers=headers)
        assert response.status_code == 401, header
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert get(served, "/v1/models").status_code == 401
    assert get(served, "/health").status_code == get(served, "/metrics").status_code == 200
    assert post(served, URL, ask, headers={"authorization": "Bearer sésame".encode()}).status_code == 200


def test_request_ids(make_served: Make) -> None:
    served = make_served()
    given = post(served, URL, {"prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    for bad in ("x" * 200, "a b"):
        made = post(served, URL, {"prompt": "a"}, headers={"x-request-id": bad}).headers["x-request-id"]
        assert made
        assert made != bad
    assert len({r.request_id for r in served.engine.requests}) == 3


def test_openais_own_client(make_served: Make) -> None:
    served = make_served(api_key="key")

    async def go() -> None:
        async with (
            served.http() as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as own,
        ):
            models = [m.id async for m in own.models.list()]
            assert models == ["echo"]
            messages: Any = [{"role": "user", "content": "Hi"}]
            chat = await own.chat.completions.create(model="echo", messages=messages, max_tokens=6)
            assert chat.choices[0].message.content == "[user]"
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 6
            stream = await own.chat.completions.create(
                model="echo", messages=messages, max_tokens=6, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "[user]"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 6
            done = await own.completions.create(model="echo", prompt="abc", max_tokens=3, logprobs=1)
            assert done.choices[0].text == "abc"
            assert done.choices[0].logprobs is not None
            with pytest.raises(openai.BadRequestError, match="maximum context length"):
                await own.completions.create(model="echo", prompt="abc", max_tokens=3000)
            with pytest.raises(openai.NotFoundError):
                await own.completions.create(model="other", prompt="abc")
            served.engine.fail_at = (1, errors.StageLost("stage 1 went away"))
            broken = await own.completions.create(model="echo", prompt="abc", stream=True)
            with pytest.raises(openai.APIError, match="stage 1 went away"):
                async for _ in broken:
                    pass
            with pytest.raises(openai.InternalServerError):
                await own.completions.create(model="echo", prompt="abc")
            served.engine.fail_at, served.engine.refuse = None, errors.QueueFull("full", retry_after_s=1)
            with pytest.raises(openai.RateLimitError):
                await own.completions.create(model="echo", prompt="abc")
        async with (
            served.http() as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as other,
        ):
            with pytest.raises(openai.AuthenticationError):
                await other.completions.create(model="echo", prompt="abc")

    asyncio.run(go())


def test_answers_hold_text_as_it_is(make_served: Make) -> None:
    response = post(make_served(), URL, {"prompt": 'é🙂"\n\u2028', "max_tokens": 30})
    assert "é🙂" in response.content.decode()
    assert 'é🙂"\n\u2028' in json.loads(response.content)["choices"][0]["text"]
