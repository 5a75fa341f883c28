"""Layers that change hands under live streams, whatever computes them: no request fails, and no token changes."""

from __future__ import annotations

import asyncio
import json

import psutil
import pytest
import streams
from disturb import COMMON, PLANNED_S, SEED, check, counts, disturbed, stagemesh, until
from mesh import Mesh, serve

from stagemesh.settings.model import DEMO_MODEL

PLAIN = ("--enforce-eager", "--deterministic", "--dtype", "float32")
"""transformers' own modules, token by token."""
DRAFT = json.dumps({"method": "draft_model", "model": str(DEMO_MODEL), "num_speculative_tokens": 3})


def connections(mesh: Mesh) -> int:
    """Those that the gateway has made."""
    found = mesh.named("stagemesh gateway")[0].net_connections("tcp")
    listens = {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}
    return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port not in listens for c in found)


def repartition(mesh: Mesh, wanted: str, status: int = 0) -> str:
    """As an operator does it."""
    return stagemesh("repartition", wanted, "--url", mesh.url, status=status)


def test_layers_go_to_and_fro(mesh: Mesh, expected: list[streams.Stream]) -> None:
    before = connections(mesh)

    def move(_: list[streams.Stream]) -> None:
        for wanted in ("1,4,3", "4,1,3", "2,2,4", "3,3,2"):
            assert f"the stages hold {wanted} layers" in repartition(mesh, wanted)

    told = asyncio.run(disturbed(mesh, move))
    check(told, expected)
    events = [e for e in mesh.get("/mesh")["events"] if e["event"] != "lost"]
    assert [e["event"] for e in events] == ["moved"] * 4
    print("paused for ms:", [e["duration_ms"] for e in events], f"longest: {max(s.longest_s for s in told):.3f} s")
    assert max(s.longest_s for s in told) < PLANNED_S
    mesh.check_pages_are_free()
    # One more: moves are reported over a connection of their own.
    asyncio.run(until(lambda: connections(mesh) <= before + 1, "connections of epochs that are over are closed", 3))


def test_what_was_moved_can_still_be_lost(mesh: Mesh, expected: list[streams.Stream]) -> None:
    """The journals of boundaries that moved are gone; those that stayed are not."""

    def move(told: list[streams.Stream]) -> None:
        repartition(mesh, "3,2,3")
        epoch = mesh.epoch()
        mesh.named("stage 1 layers")[0].kill()
        asyncio.run(until(lambda: mesh.epoch() > epoch and mesh.ready, "it goes on"))
        repartition(mesh, "2,3,3")
        assert not any(s.ended and s.error for s in told)

    told = asyncio.run(disturbed(mesh, move))
    check(told, expected)
    assert counts(mesh) == [2, 3, 3]


def test_wrong_counts_are_said(mesh: Mesh) -> None:
    assert "adds up to 9 layers, the model has 8" in repartition(mesh, "3,3,3", status=2)
    assert "names 2 stages" in repartition(mesh, "4,4", status=2)
    assert "neither auto nor counts of layers" in repartition(mesh, "three", status=2)
    assert counts(mesh) == [3, 3, 2]


@pytest.mark.parametrize(
    ("args", "first", "then"),
    [
        pytest.param(("-tp", "2"), "6,2", "3,5", id="two ranks each"),
        pytest.param(("--transport", "tcp"), "6,2", "3,5", id="over tcp", marks=pytest.mark.slow),
        pytest.param(PLAIN, "6,2", "3,5", id="plain modules"),
        pytest.param(("--speculative-config", DRAFT), "6,2", "3,5", id="with a draft model", marks=pytest.mark.slow),
    ],
)
def test_whatever_computes_them(args: tuple[str, ...], first: str, then: str) -> None:
    count, tokens = (4, 60) if args == PLAIN else (8, 250)
    with serve("-pp", "2", *COMMON[2:], *args) as mesh:
        expected = streams.make(count, tokens, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))

        def move(_: list[streams.Stream]) -> None:
            repartition(mesh, first)
            repartition(mesh, then)

        told = asyncio.run(disturbed(mesh, move, count, tokens))
        check(told, expected)
        assert counts(mesh) == [int(c) for c in then.split(",")]
        assert [e["event"] for e in mesh.get("/mesh")["events"]] == ["moved", "moved"]
        print(f"longest: {max(s.longest_s for s in told):.3f} s")
        mesh.check_pages_are_free()


def test_layers_move_by_themselves_to_where_steps_take_less() -> None:
    with serve("-pp", "2", *COMMON[2:], "--layer-partition", "1,7", "--rebalance", "auto") as mesh:
        expected = streams.make(8, 400, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))

        async def until_moved() -> None:
            deadline = asyncio.get_running_loop().time() + 90
            while counts(mesh) == [1, 7]:
                assert asyncio.get_running_loop().time() < deadline, mesh.tail()
                told = streams.make(8, 400, SEED)
                await streams.run_all(mesh.grpc_address, told)
                check(told, expected)

        asyncio.run(until_moved())
        (change,) = mesh.get("/mesh")["rebalances"]
        print(change)
        assert change["expected_us"] < 0.9 * change["before_us"]
        assert counts(mesh)[0] > 1
        mesh.check_pages_are_free()
