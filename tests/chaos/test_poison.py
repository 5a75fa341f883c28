"""A request that ends a rank each time it is computed ends with an error of its own; nobody else's stream does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import streams
from disturb import COMMON, SEED, check, until
from mesh import serve

from stagemesh import Client
from stagemesh.errors import PoisonedRequest

TOKEN = 250
"""In no prompt of the others."""
COUNT, TOKENS = 8, 200


def test_it_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    with serve(*COMMON, "--standby", "1", env={"STAGEMESH_FAULT_DIR": str(tmp_path)}) as mesh:
        mesh.wait_standbys(1)
        expected = streams.make(COUNT, TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, expected))
        assert all(TOKEN not in tokens for s in expected for tokens in (s.prompt, *s.tokens.values()))
        (tmp_path / "rank.poison").write_text(str(TOKEN))

        async def poisoned() -> streams.Stream:
            told = streams.make(COUNT, TOKENS, SEED)
            running = asyncio.create_task(streams.run_all(mesh.grpc_address, told))
            await until(lambda: all(s.length > 8 for s in told), "every stream has begun")
            bad = streams.Stream([7, TOKEN, 9], {"temperature": 0.0, "max_tokens": 8})
            async with Client(mesh.grpc_address) as client:
                await asyncio.wait_for(bad.run(client), 60)
            await asyncio.wait_for(running, 120)
            check(told, expected)
            return bad

        bad = asyncio.run(poisoned())
        assert isinstance(bad.error, PoisonedRequest), bad.error
        assert "a rank died each time request" in bad.error.message
        events = [e["event"] for e in mesh.get("/mesh")["events"]]
        assert 3 <= events.count("lost") <= 5, events
        mesh.check_pages_are_free()
