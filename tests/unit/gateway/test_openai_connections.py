"""Clients that go away, do not read, or send too much: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvloop

from stagemesh.gateway.api.http.server import bind
from stagemesh.gateway.timing import GatewayTiming

Make = Callable[..., Any]
URL = "/v1/completions"


def raw_request(url: str, body: bytes, *headers: str) -> tuple[socket.socket, str]:
    """A connected socket on which a request with `body` was sent."""
    parts = urlsplit(url)
    sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)
    head = [f"POST {URL} HTTP/1.1", "host: x", *headers, "", ""]
    sock.sendall("\r\n".join(head).encode() + body)
    return sock, parts.netloc


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["abc", ["abc", "def"]])
def test_a_client_that_goes_away_ends_its_requests(make_served: Make, stream: bool, prompt: Any) -> None:
    served = make_served()

    async def go() -> None:
        served.engine.gate = asyncio.Semaphore(3)
        async with served.http() as url:
            body = json.dumps({"prompt": prompt, "max_tokens": 100, "stream": stream}).encode()
            sock, _ = await asyncio.to_thread(raw_request, url, body, f"content-length: {len(body)}")
            count = 1 if prompt == "abc" else 2
            await served.engine.until(lambda: len(served.engine.requests) == count)
            if stream:
                assert b"200 OK" in await asyncio.to_thread(sock.recv, 100)
            assert served.engine.running
            assert not served.engine.cancelled
            sock.close()
            await served.engine.until(lambda: not served.engine.running)
            assert sorted(served.engine.cancelled) == sorted(r.request_id for r in served.engine.requests)

    uvloop.run(go())


async def is_reset(sock: socket.socket) -> bool:
    """Whether the other end gives `sock` up within ten seconds, seen by writing."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while True:
                try:
                    sock.send(b"x")
                except (ConnectionResetError, BrokenPipeError):
                    return True
                await asyncio.sleep(0.05)
    return False


def test_a_reader_that_does_not_read_stops_the_engine_from_piling_up(make_served: Make) -> None:
    """What goes out is bounded by the sockets' buffers; after the write timeout the request ends."""
    served = make_served(max_model_len=200_000, timing=GatewayTiming(write_s=1.0))

    async def go() -> None:
        async with served.http() as url:
            body = json.dumps({"prompt": "abc", "max_tokens": 150_000, "stream": True}).encode()
            sock, _ = await asyncio.to_thread(raw_request, url, body, f"content-length: {len(body)}")
            await served.engine.until(lambda: bool(served.engine.requests))
            stream = next(iter(served.engine.running.values()))
            await served.engine.until(lambda: not served.engine.running)
            # An event has some 170 bytes: all of them would be 25 MB, of which the kernel may take a few.
            assert stream.batches < 60_000
            # The connection was dropped: nothing waits in the server for a reader that may never come.
            with contextlib.closing(sock):
                assert await is_reset(sock)

    uvloop.run(go())


def test_a_slow_reader_loses_nothing(make_served: Make, events: Callable[..., list[Any]]) -> None:
    served = make_served(max_model_len=20_000)

    async def go() -> None:
        async with served.http() as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            ask = {"prompt": "abc", "max_tokens": 5000, "stream": True}
            lines: list[str] = []
            async with client.stream("POST", URL, json=ask) as response:
                async for line in response.aiter_lines():
                    lines.append(line)
                    if len(lines) % 1000 == 0:
                        await asyncio.sleep(0.05)
            got = events(lines)
            assert got[-1] == "[DONE]"
            assert "".join(e["choices"][0]["text"] for e in got[:-1]) == ("abc" * 1667)[:5000]

    uvloop.run(go())


async def pieces(total: int) -> AsyncIterator[bytes]:
    for _ in range(total >> 16):
        yield b" " * (1 << 16)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_50_mb_is_refused(make_served: Make, chunked: bool) -> None:
    served = make_served(max_body_mib=2)

    async def go() -> None:
        async with served.http() as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            headers = {} if chunked else {"content-length": str(50 << 20)}
            # httpx reads the answer only when its whole body is sent.
            response = await client.post(URL, content=pieces(50 << 20), headers=headers)
            assert response.status_code == 413
            assert "larger than 2 MiB" in response.json()["error"]["message"]
            assert response.json()["error"]["code"] == "body_too_large"
            assert (await client.post(URL, json={"prompt": "a"})).status_code == 200

    uvloop.run(go())


def test_a_large_body_is_refused_before_it_comes(make_served: Make) -> None:
    served = make_served()

    async def go() -> None:
        async with served.http() as url:
            sock, _ = await asyncio.to_thread(raw_request, url, b"", f"content-length: {50 << 20}")
            answer = await asyncio.to_thread(sock.recv, 1000)
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"100 Continue" not in answer
            sock.close()

    uvloop.run(go())


def test_an_endless_body_is_cut_off(make_served: Make) -> None:
    served = make_served(max_body_mib=1, timing=GatewayTiming(linger_bytes=1 << 20))

    def flood(sock: socket.socket) -> int:
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for sent in range(1 << 14):
            try:
                sock.sendall(chunk)
            except OSError:
                return sent
        return 1 << 14

    async def go() -> None:
        async with served.http() as url:
            sock, _ = await asyncio.to_thread(raw_request, url, b"", "transfer-encoding: chunked")
            # 1 GiB was on offer; two MiB were taken, and what the sockets' buffers hold.
            assert await asyncio.to_thread(flood, sock) < 1000
            sock.close()

    uvloop.run(go())


def test_a_body_that_does_not_come_is_given_up(make_served: Make) -> None:
    served = make_served(timing=GatewayTiming(body_s=0.2, linger_s=0.2))

    async def go() -> None:
        async with served.http() as url:
            sock, _ = await asyncio.to_thread(raw_request, url, b'{"prompt"', "content-length: 100")
            answer = await asyncio.to_thread(sock.recv, 1000)
            assert b"408" in answer.split(b"\r\n")[0]
            sock.close()

    uvloop.run(go())


def test_a_client_that_leaves_within_its_body_harms_nothing(make_served: Make) -> None:
    served = make_served()

    async def go() -> None:
        async with served.http() as url, httpx.AsyncClient(base_url=url) as client:
            sock, _ = await asyncio.to_thread(raw_request, url, b'{"prompt"', "content-length: 100")
            sock.close()
            assert (await client.post(URL, json={"prompt": "a"})).status_code == 200

    uvloop.run(go())


def test_connections_are_kept(make_served: Make) -> None:
    served = make_served()

    async def go() -> None:
        async with served.http() as url, httpx.AsyncClient(base_url=url) as client:
            ports = set()
            for stream in (False, True, False):
                async with client.stream("POST", URL, json={"prompt": "a", "stream": stream}) as response:
                    await response.aread()
                    ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            assert len(ports) == 1

    uvloop.run(go())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_all_addresses_are_those_of_both_families() -> None:
    with bind("::", 0) as listener:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, listener.getsockname()[1]), timeout=5) as client:
                assert client.getpeername()[0] == host
