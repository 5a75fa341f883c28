"""Services started one by one, as on a cluster: gateways share a pipeline's pages; a worker is drained under load."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path

import pytest
from services import Service, mesh_of, service, wait_ready

from stagemesh import Client
from stagemesh.errors import Unavailable

TIMEOUT_S = 90.0


async def ask(gateway: Service) -> list[int]:
    async with Client(f"127.0.0.1:{gateway.ports['grpc_port']}") as client:
        done = await client.generate([5, 6, 7], max_tokens=60, temperature=0, ignore_eos=True)
        return list(done.token_ids)


def test_two_gateways_share_a_pipeline(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> Service:
            return stack.enter_context(service(tmp_path, *args))

        pages = ["--max-model-len", "256", "--num-kv-pages", "64", "--gateways", "2"]
        coordinator = start("coordinator", "--port", "0", "-pp", "2", *pages)
        address = ["--coordinator", f"127.0.0.1:{coordinator.ports['port']}"]
        for stage in ("0", "1"):
            start("stage", *address, "--stage", stage, "--worker-id", f"w{stage}", "--threads", "1")
        gateways = [
            start("gateway", *address, "--port", "0", "--grpc-port", "0", "--gateway-id", f"g{i}") for i in range(2)
        ]
        for gateway in gateways:
            wait_ready(gateway)
            assert mesh_of(gateway)["gateway"]["total_pages"] == 32

        async def both() -> list[list[int]]:
            return await asyncio.gather(*(ask(gateway) for gateway in gateways * 3))

        answers = asyncio.run(both())
        assert all(answer == answers[0] for answer in answers)

        # A third finds no range, and gets the one of a gateway that dies.
        third = start("gateway", *address, "--port", "0", "--grpc-port", "0", "--gateway-id", "g2")
        deadline = time.monotonic() + TIMEOUT_S
        while "0 are free and 32 wanted" not in mesh_of(third)["reason"]:
            assert time.monotonic() < deadline, mesh_of(third)
            time.sleep(0.05)
        assert not mesh_of(third)["ready"]
        gateways[0].process.send_signal(signal.SIGKILL)
        wait_ready(third)
        assert asyncio.run(ask(third)) == asyncio.run(ask(gateways[1])) == answers[0]


def test_a_worker_on_sigterm_finishes_what_it_holds(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> Service:
            return stack.enter_context(service(tmp_path, *args))

        coordinator = start("coordinator", "--port", "0", "-pp", "2", "--max-model-len", "512")
        address = ["--coordinator", f"127.0.0.1:{coordinator.ports['port']}"]
        workers = [start("stage", *address, "--stage", s, "--worker-id", f"w{s}", "--threads", "1") for s in "01"]
        gateway = start("gateway", *address, "--port", "0", "--grpc-port", "0")
        wait_ready(gateway)

        async def story() -> int:
            async with Client(f"127.0.0.1:{gateway.ports['grpc_port']}") as client:
                tokens = 0
                async for delta in client.stream([5, 6], max_tokens=200, temperature=0, ignore_eos=True):
                    if not tokens:
                        workers[1].process.send_signal(signal.SIGTERM)
                    tokens += len(delta.token_ids)
                with pytest.raises(Unavailable):
                    await client.generate([5, 6], max_tokens=2)
                return tokens

        assert asyncio.run(story()) == 200
        assert workers[1].process.wait(15) == 0
