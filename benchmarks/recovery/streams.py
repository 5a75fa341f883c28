"""Clients that repeat their streams, and compare them with an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from stagemesh import Client
from stagemesh.errors import StagemeshError

SEED = 17
ANSWER_S = 120.0
BETWEEN_TRIES_S = 0.05


@dataclass
class Stream:
    """One client: its request, the expected tokens, and its results so far."""

    prompt: list[int]
    params: dict[str, Any]
    expected: list[int] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    last_at: float = 0.0
    pause_s: float = 0.0
    """Longest pause since the last reset."""

    async def run(self, client: Client, stop: asyncio.Event | None) -> None:
        """Sends the request over gRPC: once, for the expected tokens, or repeatedly until `stop`."""
        while stop is None or not stop.is_set():
            got: list[int] = []
            self.last_at = 0.0
            try:
                async for delta in client.stream(self.prompt, ignore_eos=True, timeout_s=ANSWER_S, **self.params):
                    self.note(got, delta.token_ids)
            except StagemeshError as e:
                await self.fail(f"{e.reason}: {e.message}")
                continue
            if stop is None:
                self.expected = got
                return
            self.finish(got)

    def note(self, got: list[int], tokens: list[int]) -> None:
        """Records a message with these tokens."""
        now = time.monotonic()
        if self.last_at:
            self.pause_s = max(self.pause_s, now - self.last_at)
        self.last_at = now
        got += tokens
        self.tokens += len(tokens)

    def finish(self, got: list[int]) -> None:
        """Records a complete answer."""
        self.finished += 1
        self.wrong += got != self.expected

    async def fail(self, why: str) -> None:
        """Records an answer that ended in an error. The client tries again a moment later."""
        self.failed.append(why)
        await asyncio.sleep(0.1)


@dataclass
class ResumingStream(Stream):
    """Sends the request over HTTP, and resumes the stream after its last event when the connection breaks."""

    asked_again: int = 0
    """Number of requests that had no answer when the connection broke."""

    async def run_http(self, url: str, stop: asyncio.Event) -> None:
        """Sends the request over HTTP repeatedly until `stop`."""
        body = {"model": None, "prompt": self.prompt, "stream": True, "ignore_eos": True, "return_token_ids": True}
        async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(ANSWER_S)) as client:
            models = (await client.get("/v1/models")).json()
            body |= {"model": models["data"][0]["id"], **self.params}
            while not stop.is_set():
                self.last_at = 0.0
                await self._answer(client, body)

    async def _answer(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        got: list[int] = []
        ident = last = coming = ""
        deadline = time.monotonic() + ANSWER_S
        while True:
            asked = (
                client.stream("GET", f"/v1/streams/{ident}", headers={"Last-Event-ID": last})
                if ident
                else client.stream("POST", "/v1/completions", json=body)
            )
            try:
                async with asked as answer:
                    if answer.status_code != 200:
                        said = (await answer.aread()).decode()
                        if answer.status_code != 503 or time.monotonic() > deadline:
                            await self.fail(f"{answer.status_code}: {said}")
                            return
                    else:
                        async for line in answer.aiter_lines():
                            if line.startswith("id: "):
                                coming = line[4:]
                            elif line == "data: [DONE]":
                                self.finish(got)
                                return
                            elif line.startswith("data: "):
                                event = json.loads(line[6:])
                                if "error" in event:
                                    await self.fail(event["error"]["message"])
                                    return
                                ident, last = event["id"], coming
                                self.note(got, [t for c in event["choices"] for t in c.get("token_ids") or []])
                                deadline = time.monotonic() + ANSWER_S
            except httpx.TransportError as e:
                if time.monotonic() > deadline:
                    await self.fail(f"{type(e).__name__}: {e}")
                    return
            self.asked_again += not ident
            await asyncio.sleep(BETWEEN_TRIES_S)


def make_streams(count: int, tokens: int) -> list[ResumingStream]:
    """Makes greedy and seeded requests with 64 to 128 tokens in and `tokens` out."""
    rng = random.Random(SEED)
    return [
        ResumingStream(
            [rng.randrange(5, 200) for _ in range(rng.randrange(64, 128))],
            {"max_tokens": tokens, "temperature": 0.0 if i % 2 else 0.8, "seed": i},
        )
        for i in range(count)
    ]
