"""Lets the tests here use the chains of `tests/numerics`, and links over every transport."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from links_bench import Bench, needs_ucxx

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))


@pytest.fixture(params=[pytest.param("ucx", marks=needs_ucxx), "tcp", "inproc"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()
