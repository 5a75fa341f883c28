"""More and fewer workers on a stage under live streams: no request fails, and no token changes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import streams
from disturb import COMMON, SEED, check, disturbed, stagemesh, until
from mesh import Mesh, serve

COUNT, TOKENS = 12, 300


SPLITS = (
    "agent.assign", "rank.assign", "rank.open_session", "rank.activate",
    "coordinator.before_epoch_write", "coordinator.after_plan_write",
)  # fmt: skip
IN_CI = (("rank.open_session", 2), ("coordinator.after_plan_write", 1))
"""One of each kind, up and down; `make chaos` goes through all."""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mesh's processes look for points at which to die."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def mesh(faults: Path) -> Iterator[Mesh]:
    """Two stages, and a standby that can be either."""
    with serve("-pp", "2", *COMMON[2:], "--standby", "1", env={"STAGEMESH_FAULT_DIR": str(faults)}) as mesh:
        mesh.wait_standbys(1)
        yield mesh


@pytest.fixture(scope="module")
def expected(mesh: Mesh) -> list[streams.Stream]:
    """What streams bring when nothing happens."""
    told = streams.make(COUNT, TOKENS, SEED)
    asyncio.run(streams.run_all(mesh.grpc_address, told))
    return told


def scale(mesh: Mesh, stage: int, replicas: int | str, status: int = 0) -> str:
    """As an operator does it."""
    return stagemesh("scale", str(stage), str(replicas), "--url", mesh.url, status=status)


def pipelines(mesh: Mesh) -> list[dict[str, Any]]:
    """As the gateway sees them."""
    found: list[dict[str, Any]] = mesh.get("/mesh")["pipelines"]
    return found


def holders(mesh: Mesh, stage: int) -> list[str]:
    """Workers that hold a stage."""
    return sorted({p["stages"][stage]["worker_id"] for p in pipelines(mesh) if p["stages"]})


def agent(mesh: Mesh, worker_id: str) -> psutil.Process:
    """A worker's agent: the process that listens at its address."""
    (address,) = [w["address"] for w in mesh.get("/mesh")["workers"] if w["worker_id"] == worker_id]
    port = int(address.rpartition(":")[2])
    for process in mesh.children():
        if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections("tcp")):
            return process
    raise AssertionError(f"nobody listens on {address}")


def spare(mesh: Mesh) -> int | None:
    """The stage whose layers the standby has loaded."""
    # One whose ranks died has none until the pipelines have served for a while.
    standbys = [w.get("layers") for w in mesh.get("/mesh")["workers"] if w["state"] == "standby"]
    return next((int(s["stage"]) for s in pipelines(mesh)[0]["stages"] if s["layers"] in standbys), None)


def busy(mesh: Mesh) -> dict[str, int]:
    """Pipeline -> choices that it runs."""
    return {name: at["running"] for name, at in driven(mesh).items()}


def driven(mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Pipeline -> what runs and waits on it, and whether it takes requests."""
    told: dict[str, dict[str, Any]] = mesh.get("/mesh")["gateway"]["pipelines"]
    return told


def test_a_stage_gets_a_second_worker_and_loses_it_again(mesh: Mesh, expected: list[streams.Stream]) -> None:
    whole = mesh.get("/mesh")["gateway"]["total_pages"]

    def more_and_fewer(_: list[streams.Stream]) -> None:
        assert "2 pipeline(s) serve" in scale(mesh, 1, 2)
        assert (len(holders(mesh, 0)), len(holders(mesh, 1))) == (1, 2)
        asyncio.run(until(lambda: mesh.get("/mesh")["gateway"]["total_pages"] == whole // 2 * 2, "both are driven"))
        asyncio.run(until(lambda: all(at["ready"] for at in driven(mesh).values()), "a token has crossed both"))
        spread = streams.make(COUNT, TOKENS, SEED)

        async def both_run() -> None:
            running = asyncio.create_task(streams.run_all(mesh.grpc_address, spread))
            await until(lambda: len(busy(mesh)) == 2 and min(busy(mesh).values()) > 0, "both run requests")
            await asyncio.wait_for(running, 120)

        asyncio.run(both_run())
        check(spread, expected)

    told = asyncio.run(disturbed(mesh, more_and_fewer, COUNT, TOKENS))
    check(told, expected)
    told = asyncio.run(disturbed(mesh, lambda _: scale(mesh, 1, 1), COUNT, TOKENS))
    check(told, expected)
    assert len(pipelines(mesh)) == 1
    assert mesh.get("/mesh")["gateway"]["total_pages"] == whole
    mesh.check_pages_are_free()


@pytest.mark.parametrize(
    "what",
    [
        "shared rank", "replica",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("shared agent", "coordinator")),
    ],
)  # fmt: skip
def test_losses_of_two_pipelines(mesh: Mesh, expected: list[streams.Stream], what: str) -> None:
    """There is no standby: what is lost comes back by itself, and meanwhile one pipeline does what both did."""
    scale(mesh, 1, 2)
    asyncio.run(until(lambda: len(busy(mesh)) == 2, "both are driven"))

    def lose(_: list[streams.Stream]) -> None:
        (shared,), replicas = holders(mesh, 0), holders(mesh, 1)
        match what:
            case "shared rank":
                mesh.named("stage 0 layers")[0].kill()
            case "shared agent":
                agent(mesh, shared).kill()
            case "replica":
                agent(mesh, replicas[0]).kill()
            case "coordinator":
                mesh.named("stagemesh coordinator")[0].kill()

    told = asyncio.run(disturbed(mesh, lose, COUNT, TOKENS))
    check(told, expected)
    states = ["PIPELINE_STATE_SERVING"] * 2
    asyncio.run(until(lambda: [p["state"] for p in pipelines(mesh)] == states, "both serve again", timeout_s=60))
    told = asyncio.run(disturbed(mesh, lambda _: None, COUNT, TOKENS))
    check(told, expected)
    if what == "replica":
        assert "handed_over" in [e["event"] for e in mesh.get("/mesh")["events"]]
    scale(mesh, 1, 1)
    mesh.check_pages_are_free()


@pytest.mark.parametrize(
    ("point", "replicas"),
    [pytest.param(*c, marks=() if c in IN_CI else pytest.mark.slow) for c in itertools.product(SPLITS, (2, 1))],
)
def test_a_process_that_dies_while_pages_are_split(
    mesh: Mesh, faults: Path, expected: list[streams.Stream], point: str, replicas: int
) -> None:
    """At any moment of it: the split is made good, and nobody's pages are another's."""
    asyncio.run(until(lambda: spare(mesh) is not None, "somebody is spare", timeout_s=60))
    stage = spare(mesh)
    assert stage is not None
    if replicas == 1:
        scale(mesh, stage, 2)

    def split(_: list[streams.Stream]) -> None:
        (faults / point).touch()
        # A coordinator that dies takes the call with it; what was wanted is written down.
        with contextlib.suppress(AssertionError):
            scale(mesh, stage, replicas)
        deadline = time.monotonic() + 30
        while (faults / point).exists():
            assert time.monotonic() < deadline, f"nobody comes to {point}:\n{mesh.tail(100)}"
            time.sleep(0.01)

    told = asyncio.run(disturbed(mesh, split, COUNT, TOKENS))
    check(told, expected)
    serving = ["PIPELINE_STATE_SERVING"] * replicas
    asyncio.run(until(lambda: [p["state"] for p in pipelines(mesh)] == serving, "it is made good", timeout_s=60))
    told = asyncio.run(disturbed(mesh, lambda _: None, COUNT, TOKENS))
    check(told, expected)
    scale(mesh, stage, 1)
    mesh.check_pages_are_free()


def test_what_cannot_be_is_said(mesh: Mesh) -> None:
    assert "there is no stage 7" in scale(mesh, 7, 2, status=2)
    assert "start 2 more with `stagemesh stage --stage 1`" in scale(mesh, 1, 4, status=2)
    assert "a stage from 0 on, then 1 or more, or auto" in scale(mesh, 1, 0, status=2)
    assert len(pipelines(mesh)) == 1
