"""A cheap load generator: keeps N completions running, each over its own HTTP/1.1 connection.

It writes requests directly to asyncio's streams. It shares the cores with the server, and a general HTTP client would
use more CPU than the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from dataclasses import dataclass, field

REQUEST_DEADLINE_S = 600.0
LIMIT_BYTES = 1 << 22


@dataclass
class HttpLoad:
    """`at_once` clients. Each sends one request after another until `requests` have been started."""

    port: int
    at_once: int
    max_tokens: int
    prompt_len: int = 8
    stream: bool = False
    requests: int | None = None
    seed: int = 0
    ended_at: list[float] = field(default_factory=list)
    """End of each successful request, by `time.monotonic()`."""
    took_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """The server's answer to each failed request."""
    _begun: int = 0

    async def __aenter__(self) -> HttpLoad:
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(self.at_once)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def done(self) -> None:
        """Waits until all `requests` have ended. Raises the error of a client."""
        await asyncio.gather(*self._tasks)

    def check(self) -> None:
        """Raises the error of a client, or RuntimeError if requests failed."""
        for task in self._tasks:
            if task.done():
                task.result()
        if self.failures:
            raise RuntimeError(f"{len(self.failures)} requests failed, the first: {self.failures[0]}")

    async def _client(self, index: int) -> None:
        rng = random.Random(self.seed + index)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=LIMIT_BYTES)
        try:
            while self.requests is None or self._begun < self.requests:
                self._begun += 1
                began = time.monotonic()
                async with asyncio.timeout(REQUEST_DEADLINE_S):
                    status, body = await self._request(reader, writer, rng)
                if status == 200:
                    self.ended_at.append(time.monotonic())
                    self.took_s.append(time.monotonic() - began)
                else:
                    self.failures.append(f"{status} {body[:300]!r}")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
    ) -> tuple[int, bytes]:
        prompt = [rng.randrange(5, 90) for _ in range(self.prompt_len)]
        asked = {"prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "stream": self.stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        header = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(header.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in header.split("\r\n")[1:] if ": " in line)
        if fields.get("transfer-encoding") == "chunked":
            return status, await _chunks(reader)
        return status, await reader.readexactly(int(fields["content-length"]))


async def tokens_a_second(url: str, at_once: int, requests: int, prompt_len: int, output_len: int) -> float:
    """Measures output tokens per second of `requests` requests. Raises RuntimeError if one failed."""
    client = HttpLoad(int(url.rpartition(":")[2]), at_once, output_len, prompt_len, requests=requests)
    began = time.monotonic()
    async with client:
        await client.done()
    client.check()
    return requests * output_len / (time.monotonic() - began)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Reads a chunked body to its end. Returns its last bytes."""
    last = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        last = await reader.readexactly(size + 2)
    await reader.readexactly(2)
    return last
