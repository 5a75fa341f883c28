"""A mesh whose stages sleep instead of computing. Its processes are the same that serve models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.errors import BenchmarkError
from benchmarks.common.facts import default_model
from stagemesh.local.children import Child
from stagemesh.local.plan import LOOPBACK, coordinator_settings, gateway_settings, worker_settings
from stagemesh.local.timing import ServeTiming
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.settings.base import Base
from stagemesh.settings.serve import ServeSettings

READY_DEADLINE_S = 240.0
STOP_DEADLINE_S = 10.0
PLUGIN = {"STAGEMESH_PLUGINS": "sleep_shard", "PYTHONPATH": str(Path(__file__).parent)}
HIDDEN = 1024
PROMPT_LEN = 8


@dataclass(frozen=True)
class Shape:
    """The properties of a mesh to start."""

    stages: int
    step_s: float
    """Seconds that each stage sleeps in a step."""
    max_num_seqs: int = 512
    max_model_len: int = 4096
    steps_in_flight: int | None = None
    """Number of concurrent steps; default: the coordinator's."""
    row_s: tuple[float, ...] = ()
    """Additional seconds for each row of a step, by stage."""


@dataclass
class SleepMesh:
    """A mesh that is ready."""

    shape: Shape
    port: int
    start_s: float
    children: list[Child]
    add: Callable[[int], Awaitable[None]]
    """Starts one more worker for a stage."""
    steps_in_flight: int = 0
    """Number of concurrent steps that the coordinator allows."""

    @property
    def base_url(self) -> str:
        """URL of the gateway."""
        return f"http://{LOOPBACK}:{self.port}"

    def check(self) -> None:
        """Raises BenchmarkError if one of its processes has ended."""
        dead = [child.label for child in self.children if not child.alive]
        if dead:
            raise BenchmarkError(f"ended during the benchmark: {', '.join(dead)}; the log says why")


def write_model(folder: Path, shape: Shape) -> Path:
    """Writes a checkpoint folder without weights: one layer per stage, which sleeps for `step_s` per step."""
    model = folder / "model"
    if not (model / "tokenizer.json").exists():
        default_model(folder, "tiny")
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["StagemeshSleep"],
        "model_type": "stagemesh_sleep",
        "num_hidden_layers": shape.stages,
        "hidden_size": HIDDEN,
        "vocab_size": vocab,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": HIDDEN,
        "max_position_embeddings": 1 << 20,
        "torch_dtype": "bfloat16",
        "step_seconds": shape.step_s,
        "row_seconds": list(shape.row_s or [0.0] * shape.stages),
    }
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return model


@contextlib.asynccontextmanager
async def running(shape: Shape, folder: Path) -> AsyncIterator[SleepMesh]:
    """Yields the mesh of `shape` when it is ready. Its log is `folder`/log. Raises BenchmarkError if it fails."""
    model = str(write_model(folder, shape))
    settings = ServeSettings(
        model=model,
        load_format="dummy",
        port=0,
        pipeline_parallel_size=shape.stages,
        max_num_seqs=shape.max_num_seqs,
        max_model_len=shape.max_model_len,
        steps_in_flight=shape.steps_in_flight,
        num_kv_pages=shape.max_num_seqs * shape.max_model_len // 16,
        max_waiting=4096,
        drain_timeout=0.0,
    )
    began = time.monotonic()
    children: list[Child] = []
    launcher, timing = Launcher("", LaunchTiming(), own_groups=True, env=PLUGIN), ServeTiming()

    def child(role: str, label: str, settings: Base) -> Child:
        children.append(Child(role, label, settings, launcher, timing))
        return children[-1]

    log = folder / "log"
    with log.open("ab") as sink, _stderr_to(sink.fileno()):
        try:
            coordinator = child("coordinator", "coordinator", coordinator_settings(settings, str(folder)))
            await coordinator.start()
            address = f"{LOOPBACK}:{coordinator.ports['port']}"
            # With the folder, a rank knows before its assignment that it needs no modelling code.
            told = {"model": model, "threads": 1}
            workers = [
                child("stage", str(worker.worker_id), worker.model_copy(update=told))
                for worker in worker_settings(settings, address)
            ]
            await asyncio.gather(*(worker.start() for worker in workers))
            gateway = child("gateway", "gateway", gateway_settings(settings, address))
            await gateway.start()

            async def add(stage: int) -> None:
                more = worker_settings(settings, address)[stage]
                name = f"{more.worker_id}-{len(children)}"
                await child("stage", name, more.model_copy(update={**told, "worker_id": name})).start()

            mesh = SleepMesh(shape, gateway.ports["port"], 0.0, children, add)
            await _until_ready(mesh, began + READY_DEADLINE_S)
            mesh.start_s = time.monotonic() - began
            mesh.steps_in_flight = await asyncio.to_thread(_steps_in_flight, mesh.base_url)
            yield mesh
        except BaseException:
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stdout)
            raise
        finally:
            for child in reversed(children):
                child.signal(signal.SIGTERM)
            await asyncio.gather(*(child.wait(STOP_DEADLINE_S) for child in children))
            for child in children:
                child.kill()
            (folder / "coordinator.sqlite").unlink(missing_ok=True)


@contextlib.contextmanager
def _stderr_to(fd: int) -> Iterator[None]:
    """Redirects this process's stderr, which children inherit, to a file during the block."""
    kept = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


async def _until_ready(mesh: SleepMesh, deadline: float) -> None:
    while not await asyncio.to_thread(_ready, mesh.base_url):
        mesh.check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the mesh of {mesh.shape.stages} stages was not ready in {READY_DEADLINE_S:.0f} s")
        await asyncio.sleep(0.1)


def _ready(base_url: str) -> bool:
    try:
        urllib.request.urlopen(base_url + "/readyz", timeout=5).close()
    except (OSError, urllib.error.HTTPError):
        return False
    return True


def _steps_in_flight(base_url: str) -> int:
    with urllib.request.urlopen(base_url + "/mesh", timeout=10) as response:
        return int(json.load(response)["pipelines"][0]["limits"]["steps_in_flight"])
