"""Clients that keep a mesh busy and write down how every request ended."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from stagemesh import Client
from stagemesh.errors import StagemeshError


@dataclass
class Ending:
    """One request: when it began and ended, and how."""

    began: float
    ended: float = 0.0
    tokens: int = 0
    error: StagemeshError | None = None


@dataclass
class Load:
    """`clients` requests at once until `stop`; each ends once, finished or with a typed error."""

    grpc_address: str
    clients: int
    seed: int
    max_tokens: int = 64
    endings: list[Ending] = field(default_factory=list)
    stopping: bool = False

    async def run(self) -> None:
        """Runs until `stopping`."""
        await asyncio.gather(*(self._client(random.Random(self.seed + i)) for i in range(self.clients)))

    async def _client(self, rng: random.Random) -> None:
        while not self.stopping:
            ending = Ending(time.monotonic())
            self.endings.append(ending)
            prompt = [rng.randrange(5, 200) for _ in range(rng.randrange(1, 60))]
            try:
                async with Client(self.grpc_address) as client:
                    async for delta in client.stream(
                        prompt, max_tokens=self.max_tokens, temperature=0.8, seed=1, ignore_eos=True, timeout_s=30
                    ):
                        ending.tokens += len(delta.token_ids)
            except StagemeshError as e:
                ending.error = e
                await asyncio.sleep(0.05)  # A client that is refused comes back, but not in a spin.
            finally:
                ending.ended = time.monotonic()

    def finished(self) -> int:
        """Requests that ended well."""
        return sum(1 for e in self.endings if e.ended and e.error is None)

    def live(self) -> list[Ending]:
        """Requests under way."""
        return [e for e in self.endings if not e.ended]
