"""A process dies at each named point of the code, within a recovery where the point lies on its way."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import streams
from disturb import COMMON, check, counts, disturbed, end_worker, holders, rank_of, stagemesh, until, wait_longer
from mesh import Mesh, serve
from resuming import Answer, Events

ROOT = Path(__file__).parents[2]
NAMED = [
    name
    for service in ("coordinator", "stage_worker", "gateway")
    for path in sorted((ROOT / service).rglob("*.py"))
    for name in re.findall(r'\bpoint\("([a-z_.]+)"\)', path.read_text())
]
POINTS = tuple(dict.fromkeys(NAMED))
"""All points, as the services' code names them."""
IN_EVERY_STEP = (
    "rank.plan", "rank.before_compute", "rank.before_send", "rank.after_send", "rank.after_release",
    "rank.before_report", "rank.before_journal",
)  # fmt: skip
OF_STANDBYS = ("agent.prepare",)
OF_DRAINS = ("agent.release",)
OF_MOVES = ("rank.copy_send", "rank.copy_land")
OF_ORDERS = ("coordinator.before_order_write", "coordinator.within_order_write", "coordinator.after_order_write")
OF_GATEWAYS = tuple(name for name in POINTS if name.startswith("gateway."))
OF_SWITCHES = ("gateway.before_switch", "gateway.after_switch")
ELSEWHERE = (*OF_GATEWAYS, "coordinator.moved")
IN_CI = {
    "coordinator.before_epoch_write", "coordinator.after_order_write", "agent.release", "rank.connect_link",
    "rank.before_send", "rank.replay", "rank.copy_land", "gateway.after_log", "gateway.before_switch",
}  # fmt: skip
"""One of each kind; `make chaos` goes through all."""


def test_a_point_has_a_name_of_its_own() -> None:
    assert len(POINTS) == len(NAMED) >= 36
    assert set(POINTS) >= IN_CI.union(
        IN_EVERY_STEP, OF_STANDBYS, OF_DRAINS, OF_MOVES, OF_ORDERS, OF_SWITCHES, ELSEWHERE
    )


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
    """A stage behind the first, which is refilled from a journal; at best one whose layers a standby has."""
    seen = mesh.get("/mesh")
    spare = [w["layers"]["last"] for w in seen["workers"] if w["state"] == "standby" and w.get("layers")]
    stages = [s["stage"] for s in seen["pipelines"][0]["stages"][1:] if s["layers"]["last"] in spare]
    return int(stages[0]) if stages else 1


def other_ranges(mesh: Mesh, one: str, other: str) -> str:
    """The one of two that the stages do not hold."""
    return other if counts(mesh) == [int(count) for count in one.split(",")] else one


def asking(mesh: Mesh, wanted: str) -> list[str]:
    """The command by which an operator asks for these ranges."""
    return [sys.executable, "-m", "stagemesh.cli.main", "repartition", wanted, "--url", mesh.url]


def carried_out(mesh: Mesh, wanted: str) -> bool:
    """Asks for them; whether the coordinator says that the stages have them."""
    done = subprocess.run(asking(mesh, wanted), capture_output=True, text=True, timeout=20)
    print(done.stdout, done.stderr)
    return f"the stages hold {wanted} layers" in done.stdout


def of(points: Iterable[str]) -> list[Any]:
    """As parameters: those that are not for CI are marked as slow."""
    return [p if p in IN_CI else pytest.param(p, marks=pytest.mark.slow) for p in points]


@pytest.mark.parametrize("point", of(p for p in POINTS if p not in ELSEWHERE))
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
        elif point in OF_ORDERS:
            wanted = other_ranges(mesh, "3,3,2", "2,4,2")
            command = asking(mesh, wanted)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as operator:
                asyncio.run(until(lambda: not (folder / point).exists(), f"it comes to {point}"))
                # Nobody is left to ask again.
                operator.kill()
            if point == "coordinator.after_order_write":
                asyncio.run(
                    until(
                        lambda: counts(mesh) == [int(n) for n in wanted.split(",")],
                        "what was written down is carried out",
                    )
                )
            else:
                # Nothing was: it is asked for again, of the next coordinator.
                asyncio.run(until(lambda: carried_out(mesh, wanted), "it is asked for again and carried out"))
        elif point in OF_MOVES:
            wanted = other_ranges(mesh, "3,3,2", "2,4,2")
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


def stop_at(folder: Path, point: str) -> None:
    """The first process that comes there stops, and says no more."""
    (folder / "written").write_text("SIGSTOP")
    (folder / "written").rename(folder / point)


def test_a_rank_that_stops_within_an_order(armed: tuple[Mesh, Path], expected: list[streams.Stream]) -> None:
    """What an order may take is minutes: it is seen that nobody is at it. The first to come there stops."""
    mesh, folder = armed
    wait_whole(mesh)

    def disturb(told: list[streams.Stream]) -> None:
        epoch = mesh.epoch()
        stop_at(folder, "rank.assign")
        rank_of(mesh, replaceable(mesh)).kill()
        wait_longer(mesh, told, epoch)

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
    assert max(s.longest_s for s in told) < 6.0
    asyncio.run(until(lambda: "hangs: it is stopped" in mesh.log.read_text(), "it is killed"))
    mesh.check_pages_are_free()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_rank_that_stops_within_its_first_step(ranks: str, tmp_path: Path) -> None:
    """What a first step may take nobody has measured; other ranks of its group wait for it meanwhile, and spin."""
    stop_at(tmp_path, "rank.before_compute")
    began = time.monotonic()
    with serve("-pp", "2", "-tp", ranks, *COMMON[2:], env={"STAGEMESH_FAULT_DIR": str(tmp_path)}) as mesh:
        assert not list(tmp_path.iterdir())
        print(f"ready after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 15
        assert "hangs: it is stopped" in mesh.log.read_text()


def test_a_coordinator_that_dies_as_it_hears_that_a_gateway_has_gone_over(
    armed: tuple[Mesh, Path], expected: list[streams.Stream]
) -> None:
    """No stream goes back to the epoch before: the next coordinator goes on with the move."""
    mesh, folder = armed
    wait_whole(mesh)
    began_at = time.time()

    def disturb(told: list[streams.Stream]) -> None:
        epoch, wanted = mesh.epoch(), other_ranges(mesh, "3,3,2", "2,4,2")
        (folder / "coordinator.moved").touch()
        stagemesh("repartition", wanted, "--url", mesh.url)
        asyncio.run(until(lambda: not (folder / "coordinator.moved").exists(), "the coordinator dies"))
        wait_longer(mesh, told, epoch)
        assert (mesh.epoch(), counts(mesh)) == (epoch + 1, [int(n) for n in wanted.split(",")])

    told = asyncio.run(disturbed(mesh, disturb))
    check(told, expected)
    assert not [e for e in mesh.get("/mesh")["events"] if e["event"] == "lost" and e["at"] >= began_at]
    mesh.check_pages_are_free()


BODY = {
    "model": "stagemesh-demo", "prompt": "Two plus two is", "max_tokens": 200, "stream": True, "ignore_eos": True,
    "temperature": 0.9, "seed": 7, "stream_options": {"include_usage": True}, "return_token_ids": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, Path, Answer]]:
    """A mesh whose gateway writes its streams down, and what one of them comes to."""
    folder, log = tmp_path_factory.mktemp("faults"), tmp_path_factory.mktemp("streams")
    with serve("-pp", "2", *COMMON[2:], "--token-log", str(log), env={"STAGEMESH_FAULT_DIR": str(folder)}) as mesh:
        answer = Answer()
        for event in Events(f"{mesh.url}/v1/completions", BODY):
            answer.take(event)
        yield mesh, folder, answer


@pytest.mark.parametrize("point", of(OF_GATEWAYS))
def test_a_gateway_that_dies_at(point: str, logged: tuple[Mesh, Path, Answer]) -> None:
    """Whatever it had told its client, that goes on behind it at the next one, with the tokens that would have come."""
    mesh, folder, whole = logged
    mesh.wait_ready()
    command = asking(mesh, other_ranges(mesh, "4,4", "5,3"))
    with subprocess.Popen(command if point in OF_SWITCHES else ["true"]):
        answer, events = Answer(), Events(f"{mesh.url}/v1/completions", BODY)
        for event in events:
            answer.take(event)
            if answer.length > 20:
                break
        (folder / point).touch()
        deadline = time.monotonic() + 30
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                for event in events:
                    answer.take(event)
                # One that broke has come to its end, too, without having finished.
                if not answer.finished or not (folder / point).exists():
                    break
                assert time.monotonic() < deadline, f"nobody comes to {point}"
                answer = Answer()
                events = Events(f"{mesh.url}/v1/completions", BODY)
    assert not (folder / point).exists(), f"nobody came to {point}"
    mesh.wait_ready()
    for ident in answer.ids:
        for event in Events(f"{mesh.url}/v1/streams/{ident}", last=events.last):
            answer.take(event)
        assert answer.same(whole)
    mesh.check_pages_are_free()
