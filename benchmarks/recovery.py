"""What clients see when parts of a mesh are killed, stopped or drained under live streams.

    python benchmarks/recovery.py MODEL [--what rank,agent,hang,coordinator,drain,repartition,nothing] [--times 50]
                                  [--streams 20] [--tokens 256] [--burners 0]

Streams run all the time: each asks one of a fixed set of requests, again and again, and its tokens are compared with
those of a run in which nothing happened. A disturbance comes when every stream has begun and a standby has its weights
loaded. Told are, of every kind: requests that failed, wrong tokens, the time until the gateway knew (`lost`), until a
token came again (`recovered`, from the loss), and the longest pause of any stream. In the row `nothing` nothing is
done for a second at a time: a loss that is told then is a false alarm. Burners are processes that compute beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import facts
import psutil
from vllm_venv import BenchmarkError

from stagemesh import Client
from stagemesh.cli import main as cli
from stagemesh.errors import StagemeshError

READY_S, BACK_S = 120.0, 60.0
KINDS = ("rank", "agent", "hang", "coordinator", "drain", "repartition", "nothing")
NOTHING_S = 1.0
PLANNED = ("drain", "repartition")
SEED = 17


@dataclass
class Stream:
    """One client: its request, what it should bring, and how it went so far."""

    prompt: list[int]
    params: dict[str, Any]
    expected: list[int] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    last_at: float = 0.0
    pause_s: float = 0.0
    """Longest since it was looked at last."""

    async def run(self, client: Client, stop: asyncio.Event | None) -> None:
        """Asks once, or again and again until `stop`."""
        while stop is None or not stop.is_set():
            got: list[int] = []
            self.last_at = 0.0
            try:
                async for delta in client.stream(self.prompt, ignore_eos=True, timeout_s=120, **self.params):
                    now = time.monotonic()
                    if self.last_at:
                        self.pause_s = max(self.pause_s, now - self.last_at)
                    self.last_at = now
                    got += delta.token_ids
                    self.tokens += len(delta.token_ids)
                self.finished += 1
                if stop is None:
                    self.expected = got
                    return
                self.wrong += got != self.expected
            except StagemeshError as e:
                self.failed.append(f"{e.reason}: {e.message}")
                await asyncio.sleep(0.1)


def make_streams(count: int, tokens: int) -> list[Stream]:
    """Greedy and seeded requests of 64 to 128 tokens in and so many out."""
    rng = random.Random(SEED)
    return [
        Stream(
            [rng.randrange(5, 200) for _ in range(rng.randrange(64, 128))],
            {"max_tokens": tokens, "temperature": 0.0 if i % 2 else 0.8, "seed": i},
        )
        for i in range(count)
    ]


@dataclass
class Mesh:
    """A `stagemesh serve` with a standby."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    grpc_address: str = ""

    def get(self) -> dict[str, Any]:
        """/mesh."""
        with urllib.request.urlopen(f"{self.url}/mesh", timeout=10) as response:
            seen: dict[str, Any] = json.load(response)
            return seen

    def wait_whole(self) -> dict[str, Any]:
        """Until it serves and a standby has layers loaded."""
        deadline = time.monotonic() + BACK_S
        while True:
            seen = self.get()
            states = [w["state"] for w in seen["workers"] if w.get("layers", {}).get("last")]
            if seen["ready"] and "standby" in states:
                return seen
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the mesh did not become whole again: {seen['reason']}")
            time.sleep(0.05)

    def alarms(self) -> int:
        """How often anybody said so far that a worker, a pipeline or a rank is lost or hangs; standbys among them."""
        lines = self.log.read_text(errors="replace").splitlines()
        return sum(" is lost" in line or " hangs: " in line for line in lines)

    def named(self, title: str) -> list[psutil.Process]:
        """Processes by their titles."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[Mesh]:
    """The mesh, with nothing left of it behind."""
    log = folder / "log"
    command = [sys.executable, "-m", "stagemesh.cli.main", "serve", str(model), "-pp", "2", "--standby", "1",
               "--max-model-len", "1024", "--port", "0", "--grpc-port", "0"]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while "HTTP on " not in (text := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"serve did not start:\n{text[-2000:]}")
            time.sleep(0.1)
        line = next(line for line in text.splitlines() if "HTTP on " in line)
        http, grpc_address = line.split("HTTP on ")[1].split(", gRPC on ")
        yield Mesh(process, log, f"http://{http}", grpc_address)
    except BaseException:
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def disturb(mesh: Mesh, kind: str, rng: random.Random) -> None:
    """Does it to one stage, or to the coordinator."""
    stage = rng.randrange(2)
    if kind == "nothing":
        time.sleep(NOTHING_S)
        return
    if kind == "repartition":
        layers = [s["layers"] for s in mesh.get()["pipelines"][0]["stages"]]
        total, here = layers[-1]["last"], layers[0]["last"]
        there = rng.choice([count for count in range(total // 4, total - total // 4 + 1) if count != here])
        operate(mesh, "repartition", f"{there},{total - there}")
        return
    if kind == "coordinator":
        # One that was started again has its title when it has read its settings.
        while not (found := mesh.named("stagemesh coordinator")):
            time.sleep(0.02)
        found[0].kill()
        return
    (rank,) = mesh.named(f"stage {stage} layers")
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


def operate(mesh: Mesh, *words: str) -> None:
    """As an operator does it, but for a process of his own: its start would be measured, too."""
    with redirect_stdout(io.StringIO()):
        if cli.main([*words, "--url", mesh.url, "--timeout", "60"]):
            raise BenchmarkError(f"{words} failed")


async def measure(
    mesh: Mesh, kind: str, times: int, streams: list[Stream]
) -> tuple[list[dict[str, float]], list[float]]:
    """Disturbs `times` times; seconds of each, and every stream's longest pause of each."""
    rng, stop, figures, pauses = random.Random(SEED), asyncio.Event(), [], list[float]()
    async with Client(mesh.grpc_address) as client:
        running = [asyncio.create_task(stream.run(client, stop)) for stream in streams]
        for _ in range(times):
            seen = await asyncio.to_thread(mesh.wait_whole)
            before = [s.tokens for s in streams]
            while any(s.tokens <= at for s, at in zip(streams, before, strict=True)):
                await asyncio.sleep(0.05)
            # At another moment of a step each time.
            await asyncio.sleep(rng.random() * 0.2)
            for stream in streams:
                stream.pause_s = 0.0
            known, began_at = len(seen["events"]), time.time()
            await asyncio.to_thread(disturb, mesh, kind, rng)
            figures.append(await after(mesh, kind, streams, known, began_at))
            pauses += [stream.pause_s for stream in streams]
            if kind == "drain":
                await asyncio.to_thread(bring_back, mesh)
        stop.set()
        await asyncio.wait(running, timeout=BACK_S)
    return figures, pauses


async def after(mesh: Mesh, kind: str, streams: list[Stream], known: int, began_at: float) -> dict[str, float]:
    """Waits until every stream has gone on."""
    told: dict[str, float] = {}
    deadline = time.monotonic() + BACK_S
    while kind not in ("coordinator", "nothing"):
        new = [e for e in (await asyncio.to_thread(mesh.get))["events"] if e["at"] >= began_at]
        ends = [e for e in new if e["event"] in ("recovered", "moved")]
        if ends and kind in PLANNED:
            told = {"paused_s": ends[-1]["duration_ms"] / 1000, "pages": ends[-1].get("pages_copied", 0),
                    "hard_way": float(any(e["event"] == "lost" for e in new))}  # fmt: skip
            break
        if ends:
            lost = next(e for e in new if e["event"] == "lost")
            told = {"known_s": lost["at"] - began_at, "recovered_s": ends[-1]["duration_ms"] / 1000,
                    "replayed_tokens": ends[-1]["replayed_tokens"]}  # fmt: skip
            break
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{kind}: not recovered within {BACK_S:g} s")
        await asyncio.sleep(0.05)
    before = [s.tokens for s in streams]
    while any(s.tokens <= at for s, at in zip(streams, before, strict=True)):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{kind}: a stream stands still")
        await asyncio.sleep(0.02)
    return {**told, "pause_s": max(s.pause_s for s in streams)}


def bring_back(mesh: Mesh) -> None:
    """A worker that was drained is ended; the supervisor starts it again as a standby."""
    for worker in [w for w in mesh.get()["workers"] if w["state"] == "draining"]:
        port = int(worker["address"].rsplit(":", 1)[1])
        for process in mesh.named("stagemesh stage") + mesh.named("stagemesh standby"):
            with suppress(psutil.NoSuchProcess):
                if any(c.laddr.port == port for c in process.net_connections() if c.status == psutil.CONN_LISTEN):
                    process.kill()


def spread(values: list[float]) -> dict[str, float]:
    """p50, p99 (the worst of fewer than 100) and the worst."""
    ordered = sorted(values)
    pick = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99)]
    return {"p50": round(pick[0], 3), "p99": round(pick[1], 3), "max": round(ordered[-1], 3)}


async def run(model: Path, kinds: list[str], times: int, count: int, tokens: int) -> dict[str, Any]:
    """All kinds, each on a mesh of its own."""
    results: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="stagemesh-recovery-") as folder, serving(model, Path(folder)) as mesh:
            await asyncio.to_thread(mesh.wait_whole)
            streams = make_streams(count, tokens)
            async with Client(mesh.grpc_address) as client:
                await asyncio.gather(*(stream.run(client, None) for stream in streams))
            for stream in streams:
                stream.finished = stream.tokens = 0
            known = mesh.alarms()
            figures, pauses = await measure(mesh, kind, times, streams)
            alarms = mesh.alarms() - known
        results[kind] = {
            "times": len(figures),
            "requests": sum(s.finished for s in streams),
            "failed": sum(len(s.failed) for s in streams),
            "errors": sorted({e for s in streams for e in s.failed})[:5],
            "wrong": sum(s.wrong for s in streams),
            **({"false_alarms": alarms} if kind == "nothing" else {}),
            **{key: spread([f[key] for f in figures]) for key in figures[0]},
            "stream_pause_s": spread(pauses),
        }
        print(kind, json.dumps(results[kind]), flush=True)
    return results


@contextmanager
def burning(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(results: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = [
        "| what | times | requests | failed | wrong tokens | known, s: p50 / p99 | next token after, s "
        "| no step planned, s | pause of a stream, s | longest of all streams, s | tokens computed again, p50 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, r in results.items():
        alarms = f", {r['false_alarms']} false alarms" if "false_alarms" in r else ""
        cells = [kind + alarms, r["times"], r["requests"], r["failed"], r["wrong"]]
        for key in ("known_s", "recovered_s", "paused_s", "stream_pause_s", "pause_s"):
            cells.append(f"{r[key]['p50']:.2f} / {r[key]['p99']:.2f}" if key in r else "-")
        cells.append(f"{r['replayed_tokens']['p50']:.0f}" if "replayed_tokens" in r else "-")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> int:
    """Measures and writes `results/recovery.*`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--what", default=",".join(KINDS))
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--burners", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--name", default="recovery", help="of the files under results")
    given = parser.parse_args()
    kinds = given.what.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"{', '.join(unknown)}: not of {', '.join(KINDS)}")
    with burning(given.burners):
        results = asyncio.run(run(given.model, kinds, given.times, given.streams, given.tokens))
    command = (
        f"python benchmarks/recovery.py MODEL --what {given.what} --times {given.times} --streams {given.streams} "
        f"--tokens {given.tokens} --burners {given.burners} --name {given.name}"
    )
    about = {"machine": facts.machine(), "versions": facts.own_versions(), "command": command, "seed": SEED}
    (facts.RESULTS / f"{given.name}.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    machine = about["machine"]
    text = [
        "# What clients see of a loss", "",
        f"Written by `{command}`: two stages and a standby, {given.streams} streams of {given.tokens} tokens, greedy "
        f"and seeded, each compared token by token with a run in which nothing happened. {machine['cores']} cores, "
        f"{machine['cpu']}, which the streams' client shares"
        + (f" with {given.burners} processes that only compute." if given.burners else "."), "",
        *table(results), "",
        "`known`: from the kill to the gateway's `lost`. `next token after`: from there to the first token that "
        "crossed all stages. `no step planned`: while layers change hands. `pause of a stream`: the longest time "
        "between two of its messages; in the row `nothing`, within a second in which nothing is done.", "",
    ]  # fmt: skip
    (facts.RESULTS / f"{given.name}.md").write_text("\n".join(text))
    return 0 if not any(r["failed"] or r["wrong"] for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
