"""Links between hosts are cut, one way and both, for a moment and for long, or slow: no request fails, no token
changes."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streams
from hosts import Hosts, hosts, services

SEED = 5
STREAMS = 6
MAX_TOKENS = 300
SLOW, SLOW_TOKENS = "256kbit", 160
COORDINATOR, GATEWAY, WORKERS = 0, 1, {"first": 2, "second": 3, "spare": 4}
"""Hosts."""
CUTS: dict[str, tuple[tuple[str | int, str | int], ...]] = {
    "front to stage": (("coordinator", 1), ("gateway", 1)),
    "stage to front": ((1, "coordinator"), (1, "gateway")),
    "front and stage": (("coordinator", 1), ("gateway", 1), (1, "coordinator"), (1, "gateway")),
    "gateway and stage": (("gateway", 1), (1, "gateway")),
    "coordinator and stage": (("coordinator", 1), (1, "coordinator")),
    "coordinator and gateway": (("coordinator", "gateway"), ("gateway", "coordinator")),
    "stage to stage": ((0, 1),),
    "stage and stage": ((0, 1), (1, 0)),
}
"""From whom to whom nothing comes any more: a stage by its number."""
IN_CI = ("stage to stage", "gateway and stage")
"""Of the longer cuts; all of them by `make chaos`."""


class Mesh:
    """Services on hosts of their own."""

    def __init__(self, net: Hosts) -> None:
        self.net = net
        self.logs: list[Path] = []
        gateway = net.hosts[GATEWAY].address
        self.url, self.grpc_address = f"http://{gateway}:8000", f"{gateway}:50051"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=5) as response:
            return json.load(response)

    def wait(self, what: str, check: Any, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if check():
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder: Path = tmp_path_factory.mktemp("hosts")
    with hosts(5) as net:
        front, gateway = net.hosts[COORDINATOR], net.hosts[GATEWAY]
        coordinator = f"{front.address}:50050"
        common = ["--insecure", "--coordinator", coordinator]
        commands = [
            (front, ["coordinator", "--host", front.address, "--insecure", "--port", "50050", "-pp", "2",
                     "--max-model-len", "1024", "--state-dir", str(folder)]),
            (gateway, ["gateway", "--host", gateway.address, *common, "--port", "8000", "--grpc-port", "50051",
                     "--recovery-deadline", "200"]),
        ]  # fmt: skip
        for name, number in WORKERS.items():
            host = net.hosts[number]
            commands.append((host, ["stage", *common, "--host", host.address, "--worker-id", name, "--threads", "1",
                                    "--ucx-tls", "tcp", "--net-device", "eth0"]))  # fmt: skip
        made = Mesh(net)
        with services(folder, commands[:4]) as first:
            made.wait("ready", lambda: made.get("/mesh")["ready"], 90)
            with services(folder, commands[4:]) as others:
                made.logs = [*first, *others]
                yield made


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> list[streams.Stream]:
    """What the streams bring when nothing happens."""
    told = streams.make(STREAMS, MAX_TOKENS, SEED)
    asyncio.run(streams.run_all(mesh.grpc_address, told))
    assert all(s.error is None for s in told)
    return told


def spare_is_ready(mesh: Mesh) -> bool:
    """Whether all three workers are there, and the one that holds no stage has layers loaded."""
    seen = mesh.get("/mesh")
    standbys = [w for w in seen["workers"] if w["state"] == "standby" and w.get("layers", {}).get("last")]
    return bool(seen["ready"]) and len(standbys) == 1


def ways(mesh: Mesh, what: str) -> list[tuple[int, int]]:
    """A cut's ways between the hosts that hold the stages now."""
    host: dict[str | int, int] = {"coordinator": COORDINATOR, "gateway": GATEWAY}
    host |= {stage["stage"]: WORKERS[stage["worker_id"]] for stage in mesh.get("/mesh")["pipelines"][0]["stages"]}
    return [(host[a], host[b]) for a, b in CUTS[what]]


async def cut_within(mesh: Mesh, what: str, seconds: float, *, whole: bool) -> list[list[streams.Stream]]:
    """Streams in whose midst the cut comes; where it lasts the `whole` time, others within and after it."""
    rounds = [streams.make(STREAMS, MAX_TOKENS, SEED)]
    running = asyncio.create_task(streams.run_all(mesh.grpc_address, rounds[0]))
    deadline = time.monotonic() + 30
    while not all(s.length > 8 for s in rounds[0]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    with mesh.net.cut(*ways(mesh, what)):
        began = time.monotonic()
        # Where all went on it may as well be over early: a later one is of more use.
        await asyncio.wait([running], timeout=seconds)
        while whole and time.monotonic() < began + seconds:
            rounds.append(streams.make(STREAMS, MAX_TOKENS, SEED))
            await streams.run_all(mesh.grpc_address, rounds[-1])
        print(f"cut for {time.monotonic() - began:.1f} s, {len(rounds)} rounds of streams")
    await asyncio.wait_for(running, 120)
    return rounds


def cut_and_check(
    mesh: Mesh, expected: list[streams.Stream], what: str, seconds: float, *, whole: bool = False
) -> None:
    mesh.wait("a standby", lambda: spare_is_ready(mesh))
    rounds = asyncio.run(cut_within(mesh, what, seconds, whole=whole))
    for told in rounds:
        for stream, other in zip(told, expected, strict=True):
            assert stream.error is None, stream.error
            assert stream.tokens == other.tokens
    # Nobody waits within a call of the system for a host that does not answer.
    assert not [line for log in mesh.logs for line in log.read_text().splitlines() if " hangs: " in line]
    print(f"{what}, {seconds:g} s: longest pause {max(s.longest_s for told in rounds for s in told):.2f} s")


def test_slow_links_are_slow_and_not_taken_for_broken(mesh: Mesh, expected: list[streams.Stream]) -> None:
    """Also where they become slow at once, when what steps take is known from faster ones."""
    mesh.wait("a standby", lambda: spare_is_ready(mesh))
    pipeline = mesh.get("/mesh")["pipelines"][0]
    held = [WORKERS[stage["worker_id"]] for stage in pipeline["stages"]]
    told = streams.make(STREAMS, SLOW_TOKENS, SEED)

    def tokens() -> int:
        return sum(s.length for s in told)

    async def speed_until(count: int) -> float:
        began, before = time.monotonic(), tokens()
        while tokens() < count:
            assert time.monotonic() < began + 60
            await asyncio.sleep(0.01)
        return (tokens() - before) / (time.monotonic() - began)

    async def story() -> tuple[float, float]:
        running = asyncio.create_task(streams.run_all(mesh.grpc_address, told))
        await speed_until(STREAMS * 8)
        fast = await speed_until(STREAMS * SLOW_TOKENS // 2)
        with mesh.net.slow(SLOW, *held):
            slow = await speed_until(STREAMS * SLOW_TOKENS * 9 // 10)
        await asyncio.wait_for(running, 60)
        return fast, slow

    fast, slow = asyncio.run(story())
    print(f"{fast:.0f}, then {slow:.0f} tokens a second, longest pause {max(s.longest_s for s in told):.2f} s")
    assert slow < fast / 2
    for stream, other in zip(told, expected, strict=True):
        assert stream.error is None, stream.error
        for choice, right in other.tokens.items():
            assert stream.tokens[choice] == right[: len(stream.tokens[choice])]
    assert mesh.get("/mesh")["pipelines"][0]["epoch"] == pipeline["epoch"], "nobody was lost"


@pytest.mark.parametrize("what", CUTS)
def test_a_cut_of_a_second(mesh: Mesh, expected: list[streams.Stream], what: str) -> None:
    cut_and_check(mesh, expected, what, 1)


@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w in IN_CI else pytest.mark.slow) for w in CUTS])
def test_a_cut_of_twenty_seconds(mesh: Mesh, expected: list[streams.Stream], what: str) -> None:
    cut_and_check(mesh, expected, what, 20, whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", CUTS)
def test_a_cut_of_two_minutes(mesh: Mesh, expected: list[streams.Stream], what: str) -> None:
    cut_and_check(mesh, expected, what, 120, whole=True)
