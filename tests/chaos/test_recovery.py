"""A stage is lost under live streams: they see a pause, and every token is the one that it would have been."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import streams
from disturb import COMMON, SEED, agent_of, check, disturbed, holders, rank_of, until, wait_longer
from mesh import Mesh, serve

from stagemesh import Client
from stagemesh.settings.model import DEMO_MODEL

IN_CI = ((1, "rank"), (0, "agent"))
LOSSES = itertools.product((0, 1, 2), ("rank", "agent"))


@pytest.mark.parametrize(
    ("stage", "who"), [pytest.param(*c, marks=() if c in IN_CI else pytest.mark.slow) for c in LOSSES]
)
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


@pytest.mark.parametrize("stopped_s", [0.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_worker_that_was_stopped_and_goes_on_changes_nothing(
    mesh: Mesh, expected: list[streams.Stream], stopped_s: float
) -> None:
    """Its lease ends, another takes its place; when it goes on it is one more standby."""
    agent, rank = agent_of(mesh, 1), rank_of(mesh, 1)
    after = refused = 0

    def disturb(told: list[streams.Stream]) -> None:
        nonlocal after, refused
        epoch, began = mesh.epoch(), time.monotonic()
        for process in (agent, rank):
            process.send_signal(signal.SIGSTOP)
        try:
            wait_longer(mesh, told, epoch)
            assert time.monotonic() - began < 3.0
            # For as long as it stands still nothing happens, and so it is the time that is waited for.
            time.sleep(max(0.0, began + stopped_s - time.monotonic()))
        finally:
            refused = late_frames(mesh)
            for process in (rank, agent):
                process.send_signal(signal.SIGCONT)
        after = mesh.epoch()
        wait_longer(mesh, told, epoch)

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)
    asyncio.run(until(lambda: states(mesh)["stage-1"] == "standby", "it stands by"))
    # It went on with what it had: that came over links that are over.
    asyncio.run(until(lambda: late_frames(mesh) > refused, "what it sent is refused and counted"))
    assert (mesh.epoch(), holders(mesh)) == (after, ["stage-0", "standby-0", "stage-2"])
    mesh.check_pages_are_free()


def late_frames(mesh: Mesh) -> int:
    return int(mesh.get("/mesh")["stale_refused"].get("frame", 0))


def states(mesh: Mesh) -> dict[str, str]:
    return {w["worker_id"]: w["state"] for w in mesh.get("/mesh")["workers"]}


def test_a_rank_that_hangs_is_noticed_though_its_sockets_are_open(mesh: Mesh, expected: list[streams.Stream]) -> None:
    victim = rank_of(mesh, 1)
    told = asyncio.run(disturbed(mesh, lambda _: victim.send_signal(signal.SIGSTOP)))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
    assert max(s.longest_s for s in told) < 3.0
    assert "hangs" in mesh.log.read_text()


@pytest.mark.slow
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


DRAFT = json.dumps({"method": "draft_model", "model": str(DEMO_MODEL), "num_speculative_tokens": 3})
LOOKUP = json.dumps({"method": "ngram", "num_speculative_tokens": 3})


@pytest.mark.parametrize(
    ("args", "count", "tokens"),
    [
        pytest.param(("-tp", "2"), 8, 250, id="two ranks each"),
        pytest.param(("--speculative-config", DRAFT), 8, 250, id="with a draft model", marks=pytest.mark.slow),
        pytest.param(("--speculative-config", LOOKUP), 8, 250, id="with prompt lookup", marks=pytest.mark.slow),
        pytest.param(("--transport", "tcp"), 8, 250, id="over tcp", marks=pytest.mark.slow),
        pytest.param(("--journal-gib", "0"), 8, 250, id="without a journal", marks=pytest.mark.slow),
        pytest.param(
            ("--enforce-eager", "--deterministic", "--dtype", "float32"), 4, 60, id="plain modules",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_whatever_computes_them_both_stages_are_lost_in_turn(args: tuple[str, ...], count: int, tokens: int) -> None:
    with serve("-pp", "2", *COMMON[2:], *args) as mesh:
        expected = streams.make(count, tokens, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))

        def disturb(told: list[streams.Stream]) -> None:
            for stage in (1, 0):
                epoch = mesh.epoch()
                mesh.named(f"stage {stage} layers")[-1].kill()
                wait_longer(mesh, told, epoch)

        told = asyncio.run(disturbed(mesh, disturb, count, tokens))
        check(told, expected)
        assert not all(s.longest_s < 0.05 for s in told), "nobody noticed"
        mesh.check_pages_are_free()


@pytest.mark.slow
def test_a_stop_string_that_comes_behind_a_loss_ends_the_answer_where_it_would_have(mesh: Mesh) -> None:
    prompts = [[5 + i, 9, 30 + i, 77] for i in range(6)]

    async def texts(stop: list[str | None], meanwhile: Callable[[], object] = lambda: None) -> list[tuple[str, str]]:
        began = asyncio.Event()

        async def one(client: Client, prompt: list[int], until: str | None) -> tuple[str, str]:
            text, reason = "", ""
            more: dict[str, Any] = {"stop": [until]} if until is not None else {}
            async for delta in client.stream(prompt, max_tokens=400, temperature=0.8, seed=3, ignore_eos=True, **more):
                text, reason = text + delta.text, delta.finish_reason or reason
                began.set()
            return text, reason

        async with Client(mesh.grpc_address) as client:
            running = [asyncio.create_task(one(client, p, s)) for p, s in zip(prompts, stop, strict=True)]
            await began.wait()
            await asyncio.to_thread(meanwhile)
            return [await task for task in running]

    whole = [text for text, _ in asyncio.run(texts([None] * len(prompts)))]
    stops = [text[-8:-2] for text in whole]
    told = asyncio.run(texts(list(stops), lambda: rank_of(mesh, 1).kill()))
    for (text, reason), full, stop in zip(told, whole, stops, strict=True):
        assert (text, reason) == (full[: full.index(stop)], "stop")
