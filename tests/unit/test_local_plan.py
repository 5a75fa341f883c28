"""Which cores `serve` gives to whom."""

from __future__ import annotations

import pytest

from stagemesh.local.plan import worker_settings
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
    assert [(w.cpu_list, w.idle_cpu_list) for w in worker_settings(serve, "here", range(cores))] == expected
