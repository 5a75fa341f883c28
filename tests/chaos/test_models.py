"""Losses and moves of models whose pages or weights are not a Llama's: no request fails, and no token changes.

Everything at random is in test_everything.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streams
from disturb import COMMON, PLANNED_S, SEED, check, counts, disturbed, holders, rank_of, stagemesh
from mesh import Mesh, serve
from models import MODELS, serve_args

COUNT, TOKENS = 5, 200


class Story:
    """One disturbance after the other, each under live streams."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._expected = streams.make(COUNT, TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, self._expected))
        self._events = 0

    def after(self, disturb: Callable[[], object], events: list[str]) -> float:
        """Checks the tokens and what the mesh says has happened. Returns the longest pause of a stream in seconds."""
        told = asyncio.run(disturbed(self._mesh, lambda _: disturb(), COUNT, TOKENS))
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


@pytest.mark.slow
def test_latent_pages_are_copied_to_as_many_ranks(tmp_path: Path) -> None:
    with serve_ranks(tmp_path) as mesh:
        Story(mesh).after(lambda: stagemesh("drain", "stage-0", "--url", mesh.url), ["moved"])
        assert holders(mesh) == ["standby-0", "stage-1"]
        mesh.check_pages_are_free()


def test_latent_pages_are_computed_again_on_more_ranks(tmp_path: Path) -> None:
    """Nobody can copy them. Two ranks add in another order than one, so later tokens may be others."""
    with serve_ranks(tmp_path) as mesh:
        tokens = 3 * TOKENS
        expected = streams.make(COUNT, tokens, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))
        before: list[dict[int, list[int]]] = []

        def drain(told: list[streams.Stream]) -> None:
            before.extend({choice: list(tokens) for choice, tokens in stream.tokens.items()} for stream in told)
            stagemesh("drain", "stage-1", "--url", mesh.url)
            assert holders(mesh) == ["stage-0", "standby-0"]

        told = asyncio.run(disturbed(mesh, drain, COUNT, tokens))
        for stream, other, had in zip(told, expected, before, strict=True):
            assert stream.error is None
            assert stream.finished == other.finished
            assert {c: len(tokens) for c, tokens in stream.tokens.items()} == {
                c: len(tokens) for c, tokens in other.tokens.items()
            }
            for choice, tokens_before in had.items():
                count = len(tokens_before)
                assert stream.tokens[choice][:count] == other.tokens[choice][:count]
        assert [event["event"] for event in mesh.get("/mesh")["events"]] == ["lost", "recovered"]
        assert "has not moved" not in mesh.log.read_text(), "it is not tried in vain"
        mesh.check_pages_are_free()


@contextlib.contextmanager
def serve_ranks(folder: Path) -> Iterator[Mesh]:
    """A stage of two ranks, one of one rank, and a standby of two."""
    args = serve_args("latent attention", folder)
    with serve(*args, "-pp", "2", "-tp", "2,1", *COMMON[2:], "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        yield mesh
