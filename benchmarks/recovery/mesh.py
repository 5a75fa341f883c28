"""Starts a `stagemesh serve` with standbys, and disturbs it."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.errors import BenchmarkError
from stagemesh.cli import main as cli

READY_S, BACK_S = 120.0, 60.0
KINDS = ("rank", "agent", "hang", "coordinator", "gateway", "drain", "repartition", "scale", "nothing")
NOTHING_S = 1.0
STABLE_S = 5.5
PLANNED = ("drain", "repartition")
HARMLESS = ("coordinator", "repartition", "scale", "nothing")
"""Kinds in which no worker, link or rank is lost: a reported loss is a false alarm."""


@dataclass
class Mesh:
    """A `stagemesh serve` with two stages, and maybe standbys."""

    process: subprocess.Popen[bytes]
    log: Path
    standbys: int
    url: str
    grpc_address: str
    first_layers: int = 0
    """Number of layers of stage 0 at the start."""

    def get(self) -> dict[str, Any]:
        """Reads /mesh."""
        with urllib.request.urlopen(f"{self.url}/mesh", timeout=10) as response:
            seen: dict[str, Any] = json.load(response)
            return seen

    def wait_whole(self) -> dict[str, Any]:
        """Waits until the mesh serves, and until each standby has loaded layers and can take either stage."""
        deadline = time.monotonic() + BACK_S
        why = "the gateway does not answer"
        while True:
            with suppress(OSError):  # A gateway that was killed comes back at its address.
                seen = self.get()
                spare = [
                    w for w in seen["workers"]
                    if w["state"] == "standby" and (w.get("pool", 0) < 0 or w.get("any_stage"))
                ]  # fmt: skip
                standbys = [w for w in spare if w.get("layers", {}).get("last")]
                if seen["ready"] and len(standbys) >= self.standbys:
                    return seen
                why = seen["reason"]
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the mesh did not become whole again: {why}")
            time.sleep(0.05)

    def wait_both_run(self) -> None:
        """Waits until two pipelines have requests."""
        deadline = time.monotonic() + BACK_S
        while len(told := self.get()["gateway"]["pipelines"]) < 2 or not all(p["running"] for p in told.values()):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"two pipelines do not both run requests: {told}")
            time.sleep(0.05)

    def alarms(self) -> int:
        """Number of log lines that report a lost or hanging worker, pipeline or rank."""
        lines = self.log.read_text(errors="replace").splitlines()
        return sum(" is lost" in line or " hangs: " in line for line in lines)

    def named(self, title: str) -> list[psutil.Process]:
        """Returns the processes with `title` in their titles."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def serving(model: Path, folder: Path, standbys: int, log: Path, *, python: str = sys.executable) -> Iterator[Mesh]:
    """Starts the mesh with `python`'s stagemesh, and ends it after the block. A log outside of `folder` is kept."""
    command = [python, "-m", "stagemesh.cli.main", "serve", str(model), "-pp", "2", "--standby", str(standbys),
               "--max-model-len", "1024", "--port", "0", "--grpc-port", "0",
               "--token-log", str(folder / "streams")]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        # It runs in its client's session: Linux divides cores equally between sessions (sched_autogroup).
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, process_group=0)
    try:
        deadline = time.monotonic() + READY_S
        while "HTTP on " not in (text := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"serve did not start:\n{text[-2000:]}")
            time.sleep(0.1)
        line = next(line for line in text.splitlines() if "HTTP on " in line)
        http, grpc_address = line.split("HTTP on ")[1].split(", gRPC on ")
        yield Mesh(process, log, standbys, f"http://{http}", grpc_address)
    except BaseException:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def disturb(mesh: Mesh, kind: str, rng: random.Random) -> float:
    """Makes one disturbance. Returns the time when it began."""
    stage = rng.randrange(2)
    began_at = time.time()
    if kind == "nothing":
        time.sleep(NOTHING_S)
        return began_at
    if kind == "repartition":
        layers = [s["layers"] for s in mesh.get()["pipelines"][0]["stages"]]
        total, here = layers[-1]["last"], layers[0]["last"]
        # Layers move back and forth, so that the first and the last speed are measured with the same layers.
        others = [count for count in range(total // 4, total - total // 4 + 1) if count != mesh.first_layers]
        there = rng.choice(others) if here == mesh.first_layers else mesh.first_layers
        operate(mesh, "repartition", f"{there},{total - there}")
        return began_at
    if kind == "scale":
        operate(mesh, "scale", str(stage), "2")
        mesh.wait_both_run()
        operate(mesh, "scale", str(stage), "1")
        return began_at
    if kind in ("coordinator", "gateway"):
        # A process that was just restarted has no title yet.
        while not (found := mesh.named(f"stagemesh {kind}")):
            time.sleep(0.02)
        if kind == "gateway":
            # A process that dies soon after its start is restarted with a growing delay, which must not be measured.
            time.sleep(max(0.0, found[0].create_time() + STABLE_S - time.time()))
        began_at = time.time()
        found[0].kill()
        return began_at
    (rank,) = mesh.named(f"stage {stage} layers")
    if not mesh.standbys:
        # As above, a growing restart delay must not be measured.
        time.sleep(max(0.0, rank.create_time() + STABLE_S - time.time()))
    began_at = time.time()
    if kind == "rank":
        rank.kill()
    elif kind == "hang":
        rank.send_signal(signal.SIGSTOP)
    elif kind == "agent":
        agent = rank.parent()
        assert agent is not None
        agent.kill()
    else:
        seen = mesh.get()
        operate(mesh, "drain", seen["pipelines"][0]["stages"][stage]["worker_id"])
    return began_at


def operate(mesh: Mesh, *words: str) -> None:
    """Runs an operator's command in this process: the start of another process would be measured, too."""
    with redirect_stdout(io.StringIO()):
        if cli.main([*words, "--url", mesh.url, "--timeout", "60"]):
            raise BenchmarkError(f"{words} failed")


def bring_back(mesh: Mesh) -> None:
    """Kills the drained worker. The supervisor restarts it, and it becomes a standby."""
    for worker in [w for w in mesh.get()["workers"] if w["state"] == "draining"]:
        port = int(worker["address"].rsplit(":", 1)[1])
        for process in mesh.named("stagemesh stage") + mesh.named("stagemesh standby"):
            with suppress(psutil.NoSuchProcess):
                if any(c.laddr.port == port for c in process.net_connections() if c.status == psutil.CONN_LISTEN):
                    process.kill()
