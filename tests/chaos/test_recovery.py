"""A stage is lost under live streams: they see a pause, and every token is the one that it would have been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import urllib.error
import urllib.request

import pytest
import streams
from disturb import COMMON, SEED, agent_of, check, disturbed, rank_of, wait_longer
from mesh import Mesh, serve


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


def test_a_standby_that_stands_still_is_not_waited_for(expected: list[streams.Stream]) -> None:
    """It is told to take the place of a lost one before anybody has seen that it does not go on."""
    with serve(*COMMON, "--standby", "2") as mesh:
        mesh.wait_standbys(2)

        def disturb(_: list[streams.Stream]) -> None:
            for standby in mesh.named("standby layers"):
                standby.send_signal(signal.SIGSTOP)
            rank_of(mesh, 1).kill()

        told = asyncio.run(disturbed(mesh, disturb))
        check(told, expected)
        print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
        assert max(s.longest_s for s in told) < 20.0
        mesh.check_pages_are_free()


def test_with_nothing_to_recover_with_requests_end_typed_and_new_ones_are_refused() -> None:
    with serve("-pp", "2", "--recovery-deadline", "3") as mesh:
        stopped = [agent_of(mesh, 1), rank_of(mesh, 1)]

        def disturb(told: list[streams.Stream]) -> None:
            began = time.monotonic()
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            try:
                while not all(s.ended for s in told):
                    assert time.monotonic() - began < 10
                    time.sleep(0.01)
                assert time.monotonic() - began > 3
                with pytest.raises(urllib.error.HTTPError) as caught:
                    mesh.post("/v1/completions", {"model": mesh.model, "prompt": "a", "max_tokens": 1})
                with caught.value as refused:
                    assert (refused.code, int(refused.headers["Retry-After"]) > 0) == (503, True)
                assert mesh.health()[0] == 503
                urllib.request.urlopen(f"{mesh.url}/livez", timeout=5).close()
            finally:
                for process in reversed(stopped):
                    process.send_signal(signal.SIGCONT)
            mesh.wait_ready()

        told = asyncio.run(disturbed(mesh, disturb))
        assert {s.error.reason if s.error else None for s in told} == {"STAGE_LOST"}
        assert len(mesh.greedy([5, 6, 7], 4)) == 4
        mesh.check_pages_are_free()
