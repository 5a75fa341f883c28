"""A process dies at each named point of the code, within a recovery where the point lies on its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import streams
from disturb import COMMON, check, disturbed, end_worker, holders, rank_of, stagemesh, wait_longer
from mesh import Mesh, serve

from stagemesh.faults import POINTS

IN_EVERY_STEP = tuple(
    name for name in POINTS
    if name in ("rank.plan", "rank.before_compute", "rank.before_send", "rank.after_send", "rank.after_release",
                "rank.before_report", "rank.before_journal")
)  # fmt: skip
OF_STANDBYS = ("agent.prepare",)
OF_DRAINS = ("agent.release",)
OF_MOVES = ("rank.copy_send", "rank.copy_land")
IN_CI = {
    "coordinator.before_epoch_write", "coordinator.after_plan_write", "agent.release", "rank.connect_link",
    "rank.before_send", "rank.replay", "rank.copy_land",
}  # fmt: skip
"""One of each kind; `make chaos` goes through all."""


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, Path]]:
    """A mesh whose processes look for faults in a folder; it goes through all of them."""
    folder = tmp_path_factory.mktemp("faults")
    with serve(*COMMON, "--standby", "2", env={"STAGEMESH_FAULT_DIR": str(folder)}) as mesh:
        yield mesh, folder


def wait_whole(mesh: Mesh, timeout_s: float = 60) -> None:
    """Until it serves, and both standbys have layers loaded."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = mesh.get("/mesh")
        spare = [w for w in seen["workers"] if w["state"] == "standby" and w.get("layers", {}).get("last")]
        if seen["ready"] and len(spare) == 2:
            return
        assert time.monotonic() < deadline, f"not whole again: {seen['reason']}, {seen['workers']}"
        time.sleep(0.05)


def replaceable(mesh: Mesh) -> int:
    """A stage behind the first for which a standby has the layers: it is refilled from a journal. (Where the spare is
    bound to another stage, two stages change hands, and the tokens are what they are refilled from.)"""
    seen = mesh.get("/mesh")
    spare = [w["layers"]["last"] for w in seen["workers"] if w["state"] == "standby" and w.get("layers")]
    stages = [s["stage"] for s in seen["pipelines"][0]["stages"][1:] if s["layers"]["last"] in spare]
    return int(stages[0]) if stages else 1


@pytest.mark.parametrize("point", [p if p in IN_CI else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_a_process_that_dies_at(point: str, armed: tuple[Mesh, Path], expected: list[streams.Stream]) -> None:
    mesh, folder = armed
    wait_whole(mesh)

    def disturb(told: list[streams.Stream]) -> None:
        epoch = mesh.epoch()
        (folder / point).touch()
        if point in OF_DRAINS:
            drained = holders(mesh)[1]
            stagemesh("drain", drained, "--url", mesh.url)
            # Whoever released its stage first has died: this one, or one that goes on with it at the next epoch.
            end_worker(mesh, drained)
        elif point in OF_MOVES:
            stages = mesh.get("/mesh")["pipelines"][0]["stages"]
            wanted = "2,4,2" if stages[0]["layers"]["last"] == 3 else "3,3,2"
            assert f"the stages hold {wanted} layers" in stagemesh("repartition", wanted, "--url", mesh.url)
        elif point not in IN_EVERY_STEP:
            rank_of(mesh, replaceable(mesh)).kill()
        deadline = time.monotonic() + 30
        while (folder / point).exists():
            if point in OF_STANDBYS and all(s.ended for s in told):
                break
            assert time.monotonic() < deadline, f"nobody comes to {point}:\n{mesh.tail(150)}"
            time.sleep(0.01)
        wait_longer(mesh, told, epoch)

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)
    deadline = time.monotonic() + 30
    while (folder / point).exists():
        assert time.monotonic() < deadline, f"nobody comes to {point}"
        time.sleep(0.01)
    mesh.check_pages_are_free()
