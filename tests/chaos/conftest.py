"""Helpers of the chaos tests are imported by name; the mesh that most of them disturb."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import streams
from disturb import COMMON, MAX_TOKENS, SEED, STREAMS
from mesh import Mesh, serve


@pytest.fixture(scope="session")
def expected() -> list[streams.Stream]:
    """What the streams bring when nothing happens."""
    with serve(*COMMON) as mesh:
        told = streams.make(STREAMS, MAX_TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, told))
        assert all(s.error is None for s in told)
        return told


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Three stages and a worker to spare."""
    with serve(*COMMON, "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        yield mesh
