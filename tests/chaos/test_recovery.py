"""A stage is lost under live streams: they see a pause, and every token is the one that it would have been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import streams
from mesh import Mesh, serve

SEED = 23
STREAMS = 16
MAX_TOKENS = 400
COMMON = ("-pp", "3", "--max-model-len", "1024")


@pytest.fixture(scope="module")
def expected() -> list[streams.Stream]:
    """What the streams bring when nothing happens."""
    with serve(*COMMON) as mesh:
        told = streams.make(STREAMS, MAX_TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, told))
        assert all(s.error is None for s in told)
        return told


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Three stages and a worker to spare."""
    with serve(*COMMON, "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        yield mesh


def rank_of(mesh: Mesh, stage: int) -> psutil.Process:
    """The rank that holds a stage now; after a loss the standby may."""
    (found,) = mesh.named(f"stage {stage} layers")
    return found


def agent_of(mesh: Mesh, stage: int) -> psutil.Process:
    """Its agent."""
    parent = rank_of(mesh, stage).parent()
    assert parent is not None
    return parent


async def until(check: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Waits for something to hold."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)


async def disturbed(mesh: Mesh, disturb: Callable[[list[streams.Stream]], object]) -> list[streams.Stream]:
    """All streams, with `disturb` in their midst."""
    told = streams.make(STREAMS, MAX_TOKENS, SEED)
    running = asyncio.create_task(streams.run_all(mesh.grpc_address, told))
    await until(lambda: all(s.length > 8 for s in told), "every stream has begun")
    assert not any(s.ended for s in told)
    await asyncio.to_thread(disturb, told)
    await asyncio.wait_for(running, 120)
    return told


def check(told: list[streams.Stream], expected: list[streams.Stream]) -> None:
    """No error, and no other token."""
    for stream, other in zip(told, expected, strict=True):
        assert stream.error is None, stream.error
        assert stream.tokens == other.tokens, f"{stream.params}: other tokens"
        assert stream.finished == other.finished


def wait_longer(mesh: Mesh, told: list[streams.Stream], epoch: int, timeout_s: float = 30) -> None:
    """Until a later epoch serves, and each stream has gone on."""
    deadline = time.monotonic() + timeout_s
    while mesh.epoch() <= epoch or not mesh.ready:
        assert time.monotonic() < deadline, "not recovered"
        time.sleep(0.01)
    before = [s.length for s in told]
    while any(s.length <= length and not s.ended for s, length in zip(told, before, strict=True)):
        assert time.monotonic() < deadline, "a stream stands still"
        time.sleep(0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("who", ["rank", "agent"])
def test_one_stage_is_lost(mesh: Mesh, expected: list[streams.Stream], stage: int, who: str) -> None:
    victim = rank_of(mesh, stage) if who == "rank" else agent_of(mesh, stage)
    told = asyncio.run(disturbed(mesh, lambda _: victim.kill()))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
    assert max(s.longest_s for s in told) < 5.0
    mesh.check_pages_are_free()


def test_without_a_standby_the_streams_wait_for_the_stage_to_come_back(expected: list[streams.Stream]) -> None:
    with serve(*COMMON) as mesh:
        told = asyncio.run(disturbed(mesh, lambda _: rank_of(mesh, 1).kill()))
        check(told, expected)
        mesh.check_pages_are_free()


def test_two_stages_at_once(mesh: Mesh, expected: list[streams.Stream]) -> None:
    victims = [rank_of(mesh, 0), rank_of(mesh, 2)]
    told = asyncio.run(disturbed(mesh, lambda _: [victim.kill() for victim in victims]))
    check(told, expected)


def test_one_after_the_other_and_within_a_recovery(mesh: Mesh, expected: list[streams.Stream]) -> None:
    rng = random.Random(SEED)
    print("seed", SEED)

    def disturb(told: list[streams.Stream]) -> None:
        for _ in range(4):
            epoch, stage = mesh.epoch(), rng.randrange(3)
            rank_of(mesh, stage).kill()
            if rng.random() < 0.5:
                # At a random moment of the recovery, the stage beside it.
                time.sleep(rng.random() * 0.5)
                for victim in mesh.named(f"stage {(stage + 1) % 3} layers"):
                    victim.kill()
            wait_longer(mesh, told, epoch)

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)


def test_a_worker_that_was_stopped_and_goes_on_changes_nothing(mesh: Mesh, expected: list[streams.Stream]) -> None:
    """Its lease ends, another takes its place; when it goes on, it is fenced."""
    agent, rank = agent_of(mesh, 1), rank_of(mesh, 1)

    def disturb(told: list[streams.Stream]) -> None:
        epoch = mesh.epoch()
        for process in (agent, rank):
            process.send_signal(signal.SIGSTOP)
        try:
            wait_longer(mesh, told, epoch)
        finally:
            for process in (rank, agent):
                process.send_signal(signal.SIGCONT)
        wait_longer(mesh, told, epoch)

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)
    assert os.path.exists(f"/proc/{agent.pid}")


def test_a_rank_that_hangs_is_noticed_though_its_sockets_are_open(mesh: Mesh, expected: list[streams.Stream]) -> None:
    victim = rank_of(mesh, 1)
    told = asyncio.run(disturbed(mesh, lambda _: victim.send_signal(signal.SIGSTOP)))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
    assert max(s.longest_s for s in told) < 3.0
    assert "hangs" in mesh.log.read_text()
