"""A stream that broke goes on at another gateway, behind the last event that its client has."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from mesh import Mesh, serve
from resuming import Answer, Events

BODY = {
    "model": "stagemesh-demo", "prompt": "Two plus two is", "max_tokens": 120, "stream": True, "ignore_eos": True,
    "temperature": 0.9, "n": 2, "logprobs": 2, "stream_options": {"include_usage": True}, "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with serve("-pp", "2", "--token-log", str(tmp_path_factory.mktemp("streams"))) as mesh:
        yield mesh


def whole(mesh: Mesh, body: dict[str, Any]) -> Answer:
    answer = Answer()
    for event in Events(f"{mesh.url}/v1/completions", body):
        answer.take(event)
    return answer


def gateway(mesh: Mesh) -> psutil.Process:
    return mesh.named("stagemesh gateway")[0]


@pytest.mark.parametrize("broken_by", ["the client", "the gateway's end"])
@pytest.mark.parametrize("seed", [7, None])
def test_a_stream_goes_on_where_it_broke(mesh: Mesh, broken_by: str, seed: int | None) -> None:
    body = {**BODY, "seed": seed} if seed is not None else BODY
    answer, events = Answer(), Events(f"{mesh.url}/v1/completions", body)
    for event in events:
        answer.take(event)
        if answer.length > 40:
            break
    if broken_by == "the client":
        events.close()
    else:
        before = gateway(mesh)
        before.kill()
        before.wait(10)
        # Whatever was sent before the end has come.
        try:
            for event in events:
                answer.take(event)
        except OSError:
            pass
        mesh.wait_ready()
    assert 40 < answer.length < 240
    (ident,) = answer.ids
    for event in Events(f"{mesh.url}/v1/streams/{ident}", last=events.last):
        answer.take(event)
    assert answer.ids == {ident}
    assert answer.finished == {0: "length", 1: "length"}
    if seed is not None:
        assert answer.same(whole(mesh, body))
    # Once more, from the start: everything is known by now.
    again = Answer()
    for event in Events(f"{mesh.url}/v1/streams/{ident}"):
        again.take(event)
    assert again.same(answer)
    mesh.check_pages_are_free()


def test_a_chat_ends_with_its_stop_string_behind_the_break(mesh: Mesh) -> None:
    body = {
        "model": "stagemesh-demo", "messages": [{"role": "user", "content": "What is seven plus five?"}],
        "max_tokens": 60, "temperature": 0, "stream": True,
    }  # fmt: skip

    def text_of(events: Events, until: int = 10**6) -> tuple[str, str]:
        text, ident = "", ""
        for event in events:
            ident = event["id"]
            text += event["choices"][0]["delta"].get("content", "")
            if len(text) >= until:
                events.close()
                break
        return text, ident

    url = f"{mesh.url}/v1/chat/completions"
    plain, _ = text_of(Events(url, body))
    assert len(plain) > 6
    stop = plain[-2:]
    expected, _ = text_of(Events(url, {**body, "stop": [stop]}))
    assert not expected.endswith(stop)
    events = Events(url, {**body, "stop": [stop]})
    begun, ident = text_of(events, until=3)
    rest, same = text_of(Events(f"{mesh.url}/v1/streams/{ident}", last=events.last))
    assert (begun + rest, same) == (expected, ident)


@pytest.mark.parametrize(
    ("ident", "last", "status", "said"),
    [
        ("cmpl-" + "0" * 32, None, 404, "no stream"),
        ("..%2F..%2Fetc%2Fpasswd", None, 404, ""),
        (None, "one", 400, "not the id of an event"),
        (None, "1", 400, "not the id of an event"),
        (None, "9999,9999", 400, "ahead of this stream"),
    ],
)
def test_wrong_ids_are_said(mesh: Mesh, ident: str | None, last: str | None, status: int, said: str) -> None:
    if ident is None:
        (ident,) = whole(mesh, {**BODY, "max_tokens": 3}).ids
    with pytest.raises(urllib.error.HTTPError) as caught:
        Events(f"{mesh.url}/v1/streams/{ident}", last=last)
    assert caught.value.code == status
    assert said in caught.value.read().decode()
