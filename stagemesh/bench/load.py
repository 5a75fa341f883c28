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
from stagemesh.fetch import error_message

READ_TIMEOUT_S = 120.0
"""Time without data after which a stream has failed."""
MAX_CLIENTS = 1024
FIRST_ID, LAST_ID = 5, 200
"""Range of the prompts' random ids. Every vocabulary has them, and most have their special tokens below it."""


@dataclass(frozen=True)
class Load:
    """`clients` concurrent requests, each with `input_tokens` random ids and `output_tokens` out. EOS is ignored."""

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
        self._unanswered = set(range(load.clients))
        self.answered = asyncio.Event()
        """Set when every client has had a first token."""

    async def run(self) -> None:
        """Sends requests until cancelled. Raises Unavailable, with the server's message, when a request fails."""
        async with asyncio.TaskGroup() as group:
            for client in range(self._load.clients):
                group.create_task(self._client(client))

    async def _client(self, client: int) -> None:
        rng = random.Random(f"{self._seed}-{client}")
        asked = {"max_tokens": self._load.output_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        while True:
            prompt = [rng.randrange(FIRST_ID, LAST_ID) for _ in range(self._load.input_tokens)]
            try:
                await self._request(client, json.dumps({"model": self._model, "prompt": prompt, **asked}).encode())
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as e:
                raise Unavailable(f"a request of the load failed: {type(e).__name__} {e}") from e

    async def _request(self, client: int, body: bytes) -> None:
        tls = ssl.create_default_context() if self._tls else None
        clock = asyncio.get_running_loop().time
        # Before Python 3.12, `wait_for` can swallow a cancellation, and the load would never end.
        async with asyncio.timeout(READ_TIMEOUT_S) as patience:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=tls)
            try:
                writer.write(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                head = await reader.readuntil(b"\r\n\r\n")
                good = head.split(b" ", 2)[1:2] == [b"200"]
                end = b""
                while data := await reader.read(65536):
                    patience.reschedule(clock() + READ_TIMEOUT_S)
                    if good:
                        self._unanswered.discard(client)
                    if not self._unanswered:
                        self.answered.set()
                    end = (end + data)[-2048:]
            finally:
                writer.close()
        if not good or b"data: [DONE]" not in end:
            raise Unavailable(f"a request of the load failed: {error_message(end) or 'no answer'}")
