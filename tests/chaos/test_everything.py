"""Everything at random: minutes in CI, other models in `make chaos`, an hour with `make chaos-hour`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
from pathlib import Path

import pytest
import streams
from disturb import COMMON
from everything import Everything, descriptors, held
from mesh import serve
from models import MODELS, serve_args
from test_kill import shared_memory

from benchmarks.common import facts

SEED = int(os.environ.get("STAGEMESH_CHAOS_SEED", "41"))
SECONDS = float(os.environ.get("STAGEMESH_CHAOS_S", "300"))
CLIENTS = int(os.environ.get("STAGEMESH_CHAOS_STREAMS", "24"))
RESULT = os.environ.get("STAGEMESH_CHAOS_RESULT")
"""A file for the figures."""
REQUESTS, MAX_TOKENS = 20, 120
pytestmark = pytest.mark.timeout(SECONDS + 300)
MINUTES, GROWTH_MIB = 10, 10
"""Of quarters from so many minutes on: what the gateway may take more in the last one than in the second."""


def test_everything_at_random() -> None:
    everything((), SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_everything_at_random_with(name: str, tmp_path: Path) -> None:
    everything(serve_args(name, tmp_path), SECONDS / 4)


def everything(model: tuple[str, ...], seconds: float) -> None:
    """Disturbs a mesh for so long. `model`: arguments of `serve`, if it is not the shipped model."""
    print(f"seed {SEED}, {seconds:g} s, {CLIENTS} streams: STAGEMESH_CHAOS_SEED, _S, _STREAMS change them")
    before = shared_memory()
    with serve(*model, *COMMON, "--standby", "2", "--max-num-seqs", str(max(32, CLIENTS))) as mesh:
        mesh.wait_standbys(2)
        expected = streams.make(REQUESTS, MAX_TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))
        assert all(s.error is None for s in expected)
        story = Everything(mesh, expected, SEED, CLIENTS)
        asyncio.run(story.run(min(20.0, seconds / 4)))
        first, kinds = held(mesh), descriptors(mesh.named("stagemesh gateway")[0])
        asyncio.run(story.run(seconds))
        story.wait_whole()
        last = held(mesh)
        print("descriptors of the gateway:", kinds, "then", descriptors(mesh.named("stagemesh gateway")[0]))
        story.check()
        mesh.check_pages_are_free()
        history = story.history
        told = {
            "command": "make chaos-hour", "date": facts.today(), "machine": facts.machine(),
            "versions": facts.own_versions(), "seed": SEED, "seconds": seconds, "streams": CLIENTS,
            "finished": history.finished, "left": history.left, "refused": history.refused,
            "failed": len(history.failed), "wrong": len(history.wrong), "unready_s": round(history.unready_s, 1),
            "longest_pause_s": round(history.longest_s, 2), "done": dict(history.done),
            "gateway_mib_each_minute": history.gateway_mib, "after_20_s": first, "at_the_end": last,
        }  # fmt: skip
        print(json.dumps(told, indent=1))
        for name in {pipeline_id for pipeline_id, _ in story.epochs}:
            epochs = [epoch for pipeline_id, epoch in story.epochs if pipeline_id == name]
            assert all(a < b for a, b in itertools.pairwise(epochs)), f"an epoch that came back: {epochs}"
        if (quarter := len(history.gateway_mib) // 4) >= MINUTES:
            second, fourth = history.gateway_mib[quarter : 2 * quarter], history.gateway_mib[-quarter:]
            assert statistics.mean(fourth) <= statistics.mean(second) + GROWTH_MIB, "the gateway's memory grows"
        for name, values in last.items():
            assert values["fds"] <= first[name]["fds"] + 15, f"descriptors of {name} grow: {first} {last}"
            assert values["threads"] <= first[name]["threads"] + 8, f"threads of {name} grow: {first} {last}"
            assert values["rss_mib"] <= 1.3 * first[name]["rss_mib"] + 50, f"memory of {name} grows: {first} {last}"
    assert shared_memory() <= before, "shared memory was left behind"
    if RESULT:
        Path(RESULT).write_text(json.dumps(told, indent=1) + "\n")
