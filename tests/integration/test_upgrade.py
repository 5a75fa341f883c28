"""Services of this tree and of the release before work together, so that a mesh is upgraded one process at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services import Service, mesh_of, service, wait_ready

from stagemesh import Client
from stagemesh.protocol import OLDEST, PROTOCOL
from stagemesh.settings.model import DEMO_MODEL

WHEEL = next((Path(__file__).parents[1] / "vendor").glob("stagemesh-*.whl"))
MODEL = ("--model", str(DEMO_MODEL))
PLAIN = ("--enforce-eager",)
"""The release before has no compiled kernels here: both compute by transformers' modules, token by token."""
PROMPTS = [[5 + i, 6, 7, 8 + i] for i in range(6)]
TOKENS, FEW = 80, 24


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `stagemesh` is the release before."""
    folder = tmp_path_factory.mktemp("before")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


async def ask(gateway: Service, tokens: int = TOKENS) -> list[list[int]]:
    """All prompts at once; the tokens of each."""
    async with Client(f"127.0.0.1:{gateway.ports['grpc_port']}") as client:
        done = await asyncio.gather(
            *(client.generate(p, max_tokens=tokens, temperature=0, ignore_eos=True) for p in PROMPTS)
        )
        return [list(d.token_ids) for d in done]


class World:
    """Services, each of this tree or of the release before."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, before: dict[str, str]) -> None:
        self._stack, self._folder, self._before = stack, folder, before

    def start(self, *args: str, old: bool = False) -> Service:
        return self._stack.enter_context(service(self._folder, *args, env=self._before if old else None))

    def coordinator(self, old: bool = False) -> str:
        args = ("-pp", "2", "--max-model-len", "512", "--dtype", "float32", "--deterministic")
        coordinator = self.start("coordinator", *MODEL, *args, "--port", "0", old=old)
        return f"127.0.0.1:{coordinator.ports['port']}"

    def stage(self, coordinator: str, name: str, *args: str, old: bool = False) -> Service:
        return self.start(
            "stage", "--coordinator", coordinator, "--worker-id", name, "--port", "0", *PLAIN, *args, old=old
        )

    def gateway(self, coordinator: str, old: bool = False) -> Service:
        gateway = self.start(
            "gateway", "--coordinator", coordinator, *MODEL, "--port", "0", "--grpc-port", "0", old=old
        )
        wait_ready(gateway)
        return gateway


@pytest.fixture
def world(tmp_path: Path, before: dict[str, str]) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(stack, tmp_path, before)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, before: dict[str, str]) -> list[list[int]]:
    """What this tree's services bring among themselves."""
    with contextlib.ExitStack() as stack:
        world = World(stack, tmp_path_factory.mktemp("expected"), before)
        coordinator = world.coordinator()
        world.stage(coordinator, "a"), world.stage(coordinator, "b")
        return asyncio.run(ask(world.gateway(coordinator)))


def workers(gateway: Service) -> dict[str, Any]:
    return {w["worker_id"]: w for w in mesh_of(gateway)["workers"]}


@pytest.mark.parametrize("old", ["coordinator", "stage", "gateway"])
def test_one_of_the_release_before_beside_ours(world: World, expected: list[list[int]], old: str) -> None:
    coordinator = world.coordinator(old == "coordinator")
    world.stage(coordinator, "a", "--stage", "0", old=old == "stage")
    world.stage(coordinator, "b", "--stage", "1")
    gateway = world.gateway(coordinator, old == "gateway")
    assert asyncio.run(ask(gateway, FEW)) == [tokens[:FEW] for tokens in expected]
    versions = {w["version"] for w in workers(gateway).values()}
    assert len(versions) == (2 if old == "stage" else 1), versions


def test_a_worker_of_the_release_before_is_replaced_while_requests_run(world: World, expected: list[list[int]]) -> None:
    coordinator = world.coordinator()
    world.stage(coordinator, "a", old=True)
    world.stage(coordinator, "b", old=True)
    gateway = world.gateway(coordinator)
    assert asyncio.run(ask(gateway, FEW)) == [tokens[:FEW] for tokens in expected]
    world.stage(coordinator, "c"), world.stage(coordinator, "d")
    deadline = time.monotonic() + 60
    while not {"c", "d"} <= workers(gateway).keys():
        assert time.monotonic() < deadline, "the new workers do not register"
        time.sleep(0.05)

    async def upgrade() -> list[list[int]]:
        running = asyncio.create_task(ask(gateway))
        for name in ("a", "b"):
            command = [sys.executable, "-m", "stagemesh.cli.main", "drain", name, "--coordinator", coordinator]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            said, _ = await asyncio.wait_for(process.communicate(), 60)
            assert f"{name} holds no stage" in said.decode()
        return await running

    assert asyncio.run(upgrade()) == expected
    holders = {s["worker_id"] for s in mesh_of(gateway)["pipelines"][0]["stages"]}
    assert holders == {"c", "d"}


def test_an_older_one_is_refused_and_told_why(world: World, before: dict[str, str]) -> None:
    """One that speaks a protocol before the oldest that is understood."""
    coordinator = world.coordinator()
    code = (
        "import sys; from stagemesh import protocol; protocol.PROTOCOL = protocol.OLDEST = 1; "
        "from stagemesh.stage_worker import membership; membership.PROTOCOL = 1; "
        "from stagemesh.cli.main import main; "
        f"sys.exit(main(['stage', '--coordinator', '{coordinator}', '--port', '0']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=before, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        deadline, said = time.monotonic() + 60, ""
        while "upgrade the older one" not in said:
            assert time.monotonic() < deadline, said
            said += process.stderr.readline()
        assert f"speaks protocol 1, this release speaks {PROTOCOL} and understands from {OLDEST} on" in said
    finally:
        process.kill()
        process.wait()
