"""What an operator does to a mesh under live streams: no request fails, and no token changes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import streams
from disturb import PLANNED_S, check, counts, disturbed, holders, stagemesh, until
from mesh import Mesh


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_drained_worker_leaves_its_stage_to_the_standby(
    mesh: Mesh, expected: list[streams.Stream], stage: int
) -> None:
    def drain(_: list[streams.Stream]) -> None:
        assert f"stage-{stage} holds no stage" in stagemesh("drain", f"stage-{stage}", "--url", mesh.url)

    told = asyncio.run(disturbed(mesh, drain))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.3f} s")
    assert max(s.longest_s for s in told) < PLANNED_S
    assert holders(mesh) == ["standby-0" if i == stage else f"stage-{i}" for i in range(3)]
    mesh.check_pages_are_free()


def test_wrong_names_are_said(mesh: Mesh) -> None:
    assert "no worker 'nobody' is registered; registered: stage-0, stage-1, stage-2, standby-0" in stagemesh(
        "drain", "nobody", "--url", mesh.url, status=1
    )
    assert "no gateway answers" in stagemesh("drain", "stage-0", "--url", "http://127.0.0.1:9", status=1)


def test_a_repartition_whose_coordinator_dies_is_carried_out_by_the_next(
    mesh: Mesh, expected: list[streams.Stream]
) -> None:
    def move(_: list[streams.Stream]) -> None:
        command = [sys.executable, "-m", "stagemesh.cli.main", "repartition", "2,2,4", "--url", mesh.url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asking:
            asyncio.run(until(lambda: "other ranges are wanted" in mesh.log.read_text(), "it is asked for"))
            mesh.named("stagemesh coordinator")[0].kill()
            # Nobody is left to ask again.
            asking.kill()
        asyncio.run(until(lambda: counts(mesh) == [2, 2, 4], "the stages hold what was asked for"))

    told = asyncio.run(disturbed(mesh, move))
    check(told, expected)
    mesh.check_pages_are_free()
