"""A client of streams that can be resumed: events as an EventSource takes them, and what they come to."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any


class Events:
    """A stream's events: id and payload, as an EventSource takes them."""

    def __init__(self, url: str, body: dict[str, Any] | None = None, last: str | None = None) -> None:
        headers = {"Content-Type": "application/json"} | ({"Last-Event-ID": last} if last is not None else {})
        data = json.dumps(body).encode() if body is not None else None
        self._response = urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60)
        self.last = last or ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ident = ""
        for raw in self._response:
            line = raw.decode().rstrip("\n")
            if line.startswith("id: "):
                ident = line[4:]
            elif line == "data: [DONE]":
                return
            elif line.startswith("data: "):
                self.last = ident or self.last
                yield json.loads(line[6:])

    def close(self) -> None:
        self._response.close()


class Answer:
    """What a client puts together."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.text: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.finished: dict[int, str] = {}
        self.usage: Any = None

    def take(self, event: dict[str, Any]) -> None:
        self.ids.add(event["id"])
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            at = choice["index"]
            self.text[at] = self.text.get(at, "") + choice["text"]
            self.tokens.setdefault(at, []).extend(choice.get("token_ids") or [])
            self.logprobs.setdefault(at, []).extend((choice["logprobs"] or {}).get("token_logprobs") or [])
            if choice["finish_reason"]:
                assert at not in self.finished, "a choice that ended twice"
                self.finished[at] = choice["finish_reason"]

    @property
    def length(self) -> int:
        return sum(map(len, self.tokens.values()))

    def same(self, other: Answer) -> bool:
        mine = (self.text, self.tokens, self.logprobs, self.finished, self.usage["completion_tokens"])
        return mine == (other.text, other.tokens, other.logprobs, other.finished, other.usage["completion_tokens"])
