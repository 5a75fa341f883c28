"""A worker that does not come back, and nobody to take its place: the others do, and requests go on."""

from __future__ import annotations

import asyncio
import signal

import psutil
import streams
from disturb import COMMON, SEED, agent_of, check, disturbed, rank_of, until
from mesh import Mesh, serve

COUNT, TOKENS = 8, 300


def workers(mesh: Mesh) -> list[str]:
    """In the order of stages; none while nothing serves."""
    (pipeline,) = mesh.get("/mesh")["pipelines"]
    return [s["worker_id"] for s in pipeline["stages"]]


def test_the_others_take_the_layers_over_and_give_them_back() -> None:
    with serve(*COMMON, "--takeover-after", "1") as mesh:
        expected = streams.make(COUNT, TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))
        supervisor = psutil.Process(mesh.process.pid)

        def lose(_: list[streams.Stream]) -> None:
            # While `serve` stands still, nobody starts the worker again.
            supervisor.send_signal(signal.SIGSTOP)
            try:
                agent_of(mesh, 1).kill()
                asyncio.run(until(lambda: workers(mesh) == ["stage-0", "stage-2"] and mesh.ready, "two stages"))
                # A rank of those two is lost: they form again as two, at once, though nobody has come back.
                before = mesh.epoch()
                rank_of(mesh, 1).kill()
                asyncio.run(until(lambda: mesh.epoch() > before and mesh.ready, "two stages again", timeout_s=10))
                assert workers(mesh) == ["stage-0", "stage-2"]
            finally:
                supervisor.send_signal(signal.SIGCONT)

        told = asyncio.run(disturbed(mesh, lose, COUNT, TOKENS))
        check(told, expected)

        def give_back(_: list[streams.Stream]) -> None:
            whole = ["stage-0", "stage-1", "stage-2"]
            asyncio.run(until(lambda: workers(mesh) == whole and mesh.ready, "three stages", timeout_s=60))

        told = asyncio.run(disturbed(mesh, give_back, COUNT, TOKENS))
        check(told, expected)
        assert [e["event"] for e in mesh.get("/mesh")["events"]] == ["lost", "recovered"] * 2 + ["moved"]
        mesh.check_pages_are_free()
