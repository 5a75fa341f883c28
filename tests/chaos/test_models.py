"""Losses and moves of models whose pages or weights are not a Llama's: no request fails, and no token changes.

Everything at random is in test_everything.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import streams
from disturb import COMMON, PLANNED_S, SEED, check, counts, disturbed, holders, rank_of, stagemesh
from mesh import Mesh, serve
from models import MODELS, serve_args

COUNT, TOKENS = 5, 200


class Story:
    """One disturbance after the other, each under live streams."""

    def __init__(self, mesh: Mesh, tokens: int = TOKENS) -> None:
        self._mesh, self._tokens = mesh, tokens
        self._expected = streams.make(COUNT, tokens, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, self._expected))
        self._events = 0

    def after(self, disturb: Callable[[], object], events: list[str]) -> float:
        """Checks the tokens and what the mesh says has happened. Returns the longest pause of a stream in seconds."""
        told = asyncio.run(disturbed(self._mesh, lambda _: disturb(), COUNT, self._tokens))
        check(told, self._expected)
        happened = [event["event"] for event in self._mesh.get("/mesh")["events"]]
        assert happened[self._events :] == events, self._mesh.tail(100)
        self._events = len(happened)
        return max(stream.longest_s for stream in told)


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_is_lost_and_layers_move(name: str, tmp_path: Path) -> None:
    with serve(*serve_args(name, tmp_path), "-pp", "2", *COMMON[2:], "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        assert "through transformers' modules" not in mesh.log.read_text()
        story = Story(mesh)
        story.after(lambda: rank_of(mesh, 1).kill(), ["lost", "recovered"])
        mesh.wait_standbys(2)
        drained = holders(mesh)[0]
        pause_s = story.after(lambda: stagemesh("drain", drained, "--url", mesh.url), ["moved"])
        assert drained not in holders(mesh)
        pause_s = max(pause_s, story.after(lambda: stagemesh("repartition", "1,5", "--url", mesh.url), ["moved"]))
        assert counts(mesh) == [1, 5]
        print(f"longest pause of what was planned: {pause_s:.3f} s")
        assert pause_s < PLANNED_S
        mesh.check_pages_are_free()


@pytest.mark.parametrize(
    ("stage", "events"),
    [
        pytest.param(0, ["moved"], id="to as many ranks", marks=pytest.mark.slow),
        pytest.param(1, ["lost", "recovered"], id="to more ranks"),
    ],
)
def test_a_stage_of_latent_pages_is_drained(stage: int, events: list[str], tmp_path: Path) -> None:
    """Pages are not copied between workers of different numbers of ranks. They are computed again."""
    args = serve_args("latent attention", tmp_path)
    with serve(*args, "-pp", "2", "-tp", "2,1", *COMMON[2:], "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        story = Story(mesh, TOKENS * 3)
        story.after(lambda: stagemesh("drain", f"stage-{stage}", "--url", mesh.url), events)
        assert holders(mesh)[stage] == "standby-0"
        mesh.check_pages_are_free()
