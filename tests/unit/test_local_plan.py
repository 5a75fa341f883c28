"""Which cores `serve` gives to whom, and what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagemesh.errors import CheckpointError, ConfigError
from stagemesh.local import supervisor
from stagemesh.local.plan import standby_settings, worker_settings
from stagemesh.processes.limits import Cores
from stagemesh.settings.serve import ServeSettings


@pytest.mark.parametrize(
    ("cores", "pp", "tp", "expected"),
    [
        (2, 2, [1], [("0", "1"), ("1", "0")]),
        (2, 1, [2], [("0|1", None)]),
        (2, 1, [1], [("0,1", None)]),
        (4, 2, [1, 2], [("0", "1,2"), ("1|2", "0|")]),
        (8, 2, [1], [("0,1,2,3", "4,5,6,7"), ("4,5,6,7", "0,1,2,3")]),
        (2, 3, [1], [(None, None)] * 3),
    ],
    ids=["a core each", "two ranks", "one stage", "three ranks of four", "several each", "too few"],
)
def test_ranks_have_cores_of_their_own_and_may_borrow_the_others(
    cores: int, pp: int, tp: list[int], expected: list[tuple[str | None, str | None]]
) -> None:
    serve = ServeSettings(model="m", pipeline_parallel_size=pp, tensor_parallel_size=tp)
    own = Cores(tuple(range(cores)), cores)
    assert [(w.cpu_list, w.idle_cpu_list) for w in worker_settings(serve, "here", own)] == expected


def test_ranks_that_would_cut_a_head_start_nothing() -> None:
    with pytest.raises(
        ConfigError, match=r"^tensor parallel size 3 does not divide .* nearest size that works is"
    ) as caught:
        supervisor.run(ServeSettings(pipeline_parallel_size=2, tensor_parallel_size=[1, 3]))
    assert len(caught.value.message) <= 200


def test_a_folder_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        supervisor.run(ServeSettings(model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("limit", "pp", "threads"), [(2, 2, 1), (5, 2, 2), (1, 2, 1), (6, 1, 6)])
def test_a_cpu_limit_bounds_the_threads_and_nobody_is_pinned(limit: int, pp: int, threads: int) -> None:
    """Containers beside this one see the same 64 cores."""
    serve = ServeSettings(model="m", pipeline_parallel_size=pp, standby=1)
    own = Cores(tuple(range(64)), limit)
    workers = [*worker_settings(serve, "here", own), *standby_settings(serve, "here", own)]
    assert [(w.threads, w.cpu_list, w.idle_cpu_list) for w in workers] == [(threads, None, None)] * (pp + 1)
