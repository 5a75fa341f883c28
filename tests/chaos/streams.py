"""Streams of every kind of sampling through the public API, and what each brought: tokens by choice, or its error."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from stagemesh import Client
from stagemesh.errors import StagemeshError

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    {"temperature": 0.7, "seed": 4, "top_p": 0.9, "presence_penalty": 0.3, "n": 2},
    {"temperature": 0.9, "seed": 5, "top_k": 20, "min_p": 0.02},
]


@dataclass
class Stream:
    """One request and how it went."""

    prompt: list[int]
    params: dict[str, Any]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By choice, in the order in which they came."""
    finished: dict[int, str] = field(default_factory=dict)
    error: StagemeshError | None = None
    longest_s: float = 0.0
    """Longest time between two messages of it."""
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens so far."""
        return sum(map(len, self.tokens.values()))

    async def run(self, client: Client) -> None:
        """Runs it once."""
        before = time.monotonic()
        try:
            async for delta in client.stream(self.prompt, ignore_eos=True, timeout_s=120, **self.params):
                now = time.monotonic()
                self.longest_s, before = max(self.longest_s, now - before), now
                self.tokens.setdefault(delta.choice, []).extend(delta.token_ids)
                if delta.finish_reason:
                    assert delta.choice not in self.finished, "a choice that ended twice"
                    self.finished[delta.choice] = delta.finish_reason
        except StagemeshError as e:
            self.error = e
        self.ended = True


def make(count: int, max_tokens: int, seed: int) -> list[Stream]:
    """`count` streams; several share the beginning of their prompts."""
    rng = random.Random(seed)
    common = [rng.randrange(5, 200) for _ in range(40)]
    streams = []
    for number in range(count):
        own = [rng.randrange(5, 200) for _ in range(rng.randrange(1, 60))]
        prompt = common + own if number % 3 == 0 else own
        streams.append(Stream(prompt, {**KINDS[number % len(KINDS)], "max_tokens": max_tokens + number % 7}))
    return streams


async def run_all(grpc_address: str, streams: list[Stream]) -> None:
    """All of them at once, to their ends."""
    async with Client(grpc_address) as client:
        await asyncio.gather(*(stream.run(client) for stream in streams))
