"""Generates load on a gateway: streamed completions over HTTP.

It shares the machine's cores with the mesh, so it reads the answers without parsing them.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from stagemesh.errors import ConfigError, Unavailable

READ_TIMEOUT_S = 120.0
"""A stream on which nothing comes for so long has failed."""
MAX_CLIENTS = 1024
FIRST_ID, LAST_ID = 5, 200
"""Prompts are random ids of this range. Every vocabulary has them, and most have their special tokens below."""


@dataclass(frozen=True)
class Load:
    """`clients` concurrent requests, each of `input_tokens` random ids in and `output_tokens` out. EOS is ignored."""

    clients: int
    input_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Load:
        """Parses `16x128x64`. Raises ConfigError."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text)
        values = [int(v) for v in match.groups()] if match else []
        if not values or min(values) < 1 or values[0] > MAX_CLIENTS:
            raise ConfigError(
                f"--load {text!r} must be CLIENTSxINPUTxOUTPUT, such as 16x128x64: at most {MAX_CLIENTS} clients, and "
                "at least one token in and out"
            )
        return cls(*values)


class Driver:
    """Keeps a load on one gateway until it is cancelled."""

    def __init__(self, load: Load, url: str, model: str, api_key: str | None, seed: int) -> None:
        parts = urlsplit(url)
        self._load, self._model, self._seed = load, model, seed
        self._host, self._tls = parts.hostname or "127.0.0.1", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._head = (
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
            "Content-Type: application/json\r\n"
        ) + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self._waiting = load.clients
        self.answered = asyncio.Event()
        """Set when every client has had a first token."""
        self.requests = 0
        """Number of finished requests."""

    async def run(self) -> None:
        """Sends requests until cancelled. Raises Unavailable, with the server's message, when a request fails."""
        async with asyncio.TaskGroup() as group:
            for i in range(self._load.clients):
                group.create_task(self._client(random.Random(f"{self._seed}-{i}")))

    async def _client(self, rng: random.Random) -> None:
        first = True
        while True:
            prompt = [rng.randrange(FIRST_ID, LAST_ID) for _ in range(self._load.input_tokens)]
            await self._request(prompt, first)
            self.requests += 1
            first = False

    async def _request(self, prompt: list[int], first: bool) -> None:
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": self._load.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        ).encode()
        try:
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=ssl.create_default_context() if self._tls else None
            )
        except OSError as e:
            raise Unavailable(f"the load cannot connect to {self._host}:{self._port}: {e}") from e
        try:
            writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await self._read(reader, first)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
            raise Unavailable(f"a request of the load failed: {type(e).__name__} {e}") from e
        finally:
            writer.close()

    @staticmethod
    async def _piece(reader: asyncio.StreamReader) -> bytes:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await reader.read(65536)

    async def _read(self, reader: asyncio.StreamReader, first: bool) -> None:
        # Not wait_for: before Python 3.12 it can swallow a cancellation, and the load would never end.
        async with asyncio.timeout(READ_TIMEOUT_S):
            head = await reader.readuntil(b"\r\n\r\n")
        good = head.split(b" ", 2)[1:2] == [b"200"]
        end = b""
        while data := await self._piece(reader):
            if first and good:
                first = False
                self._waiting -= 1
                if not self._waiting:
                    self.answered.set()
            end = (end + data)[-2048:]
        if not good or b"data: [DONE]" not in end:
            raise Unavailable(f"a request of the load failed: {_said(end)}")


def _said(body: bytes) -> str:
    """The message of an error in OpenAI's format, found in the last bytes of an answer."""
    found = re.search(rb'\{"error":\{"message":("(?:[^"\\]|\\.)*")', body)
    return json.loads(found.group(1)) if found else (body[-300:].decode(errors="replace") or "no answer")
