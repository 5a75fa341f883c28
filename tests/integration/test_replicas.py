"""One more worker for a stage, started and ended as on a cluster, while a client's requests go on."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services import Service, mesh_of, service, wait_ready

from stagemesh import Client
from stagemesh.settings.model import DEMO_MODEL

PROMPT, TOKENS = list(range(20, 60)), 60


def until(gateway: Service, check: Callable[[Any], bool], what: str, timeout_s: float = 60) -> None:
    """Waits for something to hold of the mesh."""
    deadline = time.monotonic() + timeout_s
    while not check(seen := mesh_of(gateway)):
        assert time.monotonic() < deadline, f"{what}: {seen}"
        time.sleep(0.02)


def serving(mesh: Any) -> int:
    states = [p["state"] for p in mesh["pipelines"]]
    return len(states) if states == ["PIPELINE_STATE_SERVING"] * len(states) else 0


async def ask(gateway: Service, stop: asyncio.Event) -> list[tuple[int, ...]]:
    """The same request again and again: what each brought."""
    found = []
    async with Client(f"127.0.0.1:{gateway.ports['grpc_port']}") as client:
        while not stop.is_set():
            done = await client.generate(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            found.append(tuple(done.token_ids))
    return found


def test_a_worker_more_and_a_worker_less(tmp_path: Path) -> None:
    model = ("--model", str(DEMO_MODEL), "--max-model-len", "512")
    with service(tmp_path, "coordinator", *model, "-pp", "2", "--port", "0") as coordinator:
        address = ("--coordinator", f"127.0.0.1:{coordinator.ports['port']}", "--port", "0")
        stage = ("stage", *address, "--threads", "1", "--stage")
        with (
            service(tmp_path, *stage, "0", "--worker-id", "a"),
            service(tmp_path, *stage, "1", "--worker-id", "b"),
            service(tmp_path, "gateway", *address, "--grpc-port", "0") as gateway,
        ):
            wait_ready(gateway)

            async def story() -> list[tuple[int, ...]]:
                stop = asyncio.Event()
                asking = [asyncio.create_task(ask(gateway, stop)) for _ in range(3)]
                await asyncio.to_thread(more_and_less)
                stop.set()
                return [tokens for found in await asyncio.gather(*asking) for tokens in found]

            def more_and_less() -> None:
                with service(tmp_path, *stage, "1", "--worker-id", "b2") as second:
                    until(gateway, lambda m: serving(m) == 2, "two pipelines")
                    until(gateway, lambda m: len(m["gateway"]["pipelines"]) == 2, "both are driven")
                    second.process.send_signal(signal.SIGTERM)
                    second.process.wait(30)
                until(gateway, lambda m: serving(m) == 1, "one pipeline")

            answers = asyncio.run(story())
            assert len(answers) > 3
            assert len(set(answers)) == 1, "other tokens"
            (pipeline,) = mesh_of(gateway)["pipelines"]
            assert [s["worker_id"] for s in pipeline["stages"]] == ["a", "b"]
            assert "lost" not in [e["event"] for e in mesh_of(gateway)["events"]]
