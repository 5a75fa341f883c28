"""What an operator does to a mesh under live streams: no request fails, and no token changes."""

from __future__ import annotations

import asyncio

import pytest
import streams
from disturb import check, disturbed, holders, stagemesh
from mesh import Mesh


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_drained_worker_leaves_its_stage_to_the_standby(
    mesh: Mesh, expected: list[streams.Stream], stage: int
) -> None:
    def drain(_: list[streams.Stream]) -> None:
        assert f"stage-{stage} holds no stage" in stagemesh("drain", f"stage-{stage}", "--url", mesh.url)

    told = asyncio.run(disturbed(mesh, drain))
    check(told, expected)
    print(f"longest pause: {max(s.longest_s for s in told):.3f} s")
    assert holders(mesh) == ["standby-0" if i == stage else f"stage-{i}" for i in range(3)]
    mesh.check_pages_are_free()


def test_wrong_names_are_said(mesh: Mesh) -> None:
    assert "no worker 'nobody' is registered; registered: stage-0, stage-1, stage-2, standby-0" in stagemesh(
        "drain", "nobody", "--url", mesh.url, status=1
    )
    assert "no gateway answers" in stagemesh("drain", "stage-0", "--url", "http://127.0.0.1:9", status=1)
