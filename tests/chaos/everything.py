"""Everything at random, for as long as is wanted: what is done to a mesh, and the history that its clients write.

The history is checked against what was promised: each request that was accepted ends once, its tokens are those of a
run in which nothing happened (so none is missing, twice or rewritten), and in the end nothing is held that was held for
it. What is done follows from the seed, but for the moment's state: a seed brings the same faults in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import streams
from disturb import end_worker, stagemesh
from mesh import Mesh

from stagemesh import Client

REST_S = (0.2, 2.5)
"""Between two faults."""
WHOLE_S = 90.0
LEAVES = 0.1
"""Of requests, those whose client goes away in the midst."""


@dataclass
class History:
    """What all clients saw."""

    finished: int = 0
    left: int = 0
    """Requests whose client went away."""
    refused: int = 0
    """Not accepted: there was nothing that could serve."""
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    unready_s: float = 0.0
    """How long nothing could be accepted, looked at every 0.1 s."""
    gateway_mib: list[float] = field(default_factory=list)
    """The gateway's resident memory, once a minute."""
    done: Counter[str] = field(default_factory=Counter)
    """What was done to the mesh."""


@dataclass
class Everything:
    """`clients` streams and one fault after the other on a mesh of `stages` stages."""

    mesh: Mesh
    expected: list[streams.Stream]
    seed: int
    clients: int
    stages: int = 3
    history: History = field(default_factory=History)
    epochs: list[tuple[str, int]] = field(default_factory=list)
    """(pipeline, epoch) at which a token crossed or to which it moved, in order, however many there were."""
    _seen_at: float = 0.0

    async def run(self, seconds: float) -> None:
        """Until the time is up, and every request has ended."""
        stop = asyncio.Event()
        async with Client(self.mesh.grpc_address) as client:
            running = [
                asyncio.create_task(self._client(client, random.Random(f"{self.seed} {i}"), stop))
                for i in range(self.clients)
            ]
            running.append(asyncio.create_task(self._probe(stop)))
            try:
                await self._disturb(time.monotonic() + seconds)
            finally:
                stop.set()
                await asyncio.wait_for(asyncio.gather(*running), 180)

    # -- clients ----------------------------------------------------------------------------------------------------

    async def _client(self, client: Client, rng: random.Random, stop: asyncio.Event) -> None:
        while not stop.is_set():
            other = rng.choice(self.expected)
            leaves = rng.random() < LEAVES
            await self._request(client, other, rng.randrange(1, 40) if leaves else None)

    async def _request(self, client: Client, other: streams.Stream, leave_after: int | None) -> None:
        stream = streams.Stream(other.prompt, other.params)
        running = asyncio.create_task(stream.run(client))
        while leave_after is not None and not running.done():
            if stream.length >= leave_after:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                self.history.left += 1
                return
            await asyncio.sleep(0.01)
        await running
        self.history.longest_s = max(self.history.longest_s, stream.longest_s)
        error = stream.error
        if error is None and (stream.tokens, stream.finished) == (other.tokens, other.finished):
            self.history.finished += 1
        elif error is None:
            self.history.wrong.append(_difference(stream, other))
            print(f"{time.strftime('%H:%M:%S')} WRONG {self.history.wrong[-1]}", flush=True)
        elif not stream.length and error.reason == "UNAVAILABLE":
            self.history.refused += 1
            await asyncio.sleep(0.1)
        else:
            self.history.failed.append(f"after {stream.length} tokens: {error.reason}: {error.message}")

    async def _probe(self, stop: asyncio.Event) -> None:
        began = before = time.monotonic()
        while not stop.is_set():
            ready = await asyncio.to_thread(self._is_ready)
            now = time.monotonic()
            if now - began >= 60 * len(self.history.gateway_mib):
                self.history.gateway_mib.append(round(held(self.mesh)["gateway"]["rss_mib"], 1))
            self.history.unready_s += 0.0 if ready else now - before
            before = now
            await asyncio.sleep(0.1)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            seen = self.mesh.get("/mesh")
            for event in seen["events"]:
                # The newest 64 are told: those since the last look, ten of which come in a second, are among them.
                if event["at"] > self._seen_at and event["event"] in ("recovered", "moved"):
                    entry = event["pipeline_id"], event["epoch"]
                    # What moves to make a loss good is told as both.
                    if event["event"] == "recovered" or self.epochs[-1:] != [entry]:
                        self.epochs.append(entry)
            self._seen_at = max([self._seen_at, *(event["at"] for event in seen["events"])])
            return bool(seen["ready"])
        return False

    # -- faults -----------------------------------------------------------------------------------------------------

    async def _disturb(self, until: float) -> None:
        rng = random.Random(self.seed)
        kinds = [
            (self._kill_rank, 6), (self._kill_forkserver, 1), (self._kill_agent, 3), (self._stop_rank, 2),
            (self._stop_agent, 1), (self._kill_coordinator, 2), (self._drain, 2), (self._repartition, 3),
            (self._scale, 3),
        ]  # fmt: skip
        while time.monotonic() < until:
            await asyncio.sleep(rng.uniform(*REST_S))
            fault = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
            words = random.Random(rng.random())
            name = fault.__name__.removeprefix("_")
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            if await asyncio.to_thread(fault, words):
                self.history.done[name] += 1
            if rng.random() < 0.6:
                # Else the next one comes into the midst of what this one has done.
                await asyncio.to_thread(self.wait_whole)

    def _ranks(self) -> list[psutil.Process]:
        return self.mesh.named(" layers ")

    def _kill_rank(self, rng: random.Random) -> bool:
        ranks = self._ranks()
        if ranks:
            rng.choice(ranks).kill()
        return bool(ranks)

    def _agent(self, rng: random.Random) -> psutil.Process | None:
        ranks = self._ranks()
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.mesh.agent_of(rng.choice(ranks)) if ranks else None
        return None

    def _kill_forkserver(self, rng: random.Random) -> bool:
        """A worker's, or that of `serve`: what it has forked goes on."""
        found = self.mesh.named("forkserver")
        if found:
            rng.choice(found).kill()
        return bool(found)

    def _kill_agent(self, rng: random.Random) -> bool:
        agent = self._agent(rng)
        if agent is None:
            return False
        agent.kill()
        return True

    def _stop_rank(self, rng: random.Random) -> bool:
        ranks = self._ranks()
        if ranks:
            rng.choice(ranks).send_signal(signal.SIGSTOP)
        return bool(ranks)

    def _stop_agent(self, rng: random.Random) -> bool:
        """For a moment or for longer than its lease; then it goes on."""
        agent = self._agent(rng)
        if agent is None:
            return False
        agent.send_signal(signal.SIGSTOP)
        time.sleep(rng.choice((0.2, 1.0, 3.0)))
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.send_signal(signal.SIGCONT)
        return True

    def _kill_coordinator(self, rng: random.Random) -> bool:
        found = self.mesh.named("stagemesh coordinator")
        if found:
            found[0].kill()
        return bool(found)

    def _drain(self, rng: random.Random) -> bool:
        """The worker is ended when it holds nothing, and comes back: so an upgrade goes, stage by stage."""
        self.wait_whole()
        pipelines = self.mesh.get("/mesh")["pipelines"]
        worker = rng.choice(sorted({s["worker_id"] for p in pipelines for s in p["stages"]}))
        try:
            stagemesh("drain", worker, "--url", self.mesh.url, "--timeout", "15")
        except AssertionError as e:
            # A fault of before may have taken it meanwhile.
            if f"no worker '{worker}'" in str(e):
                return False
            # All that is spare may be bound to another stage, or be lost by now.
            if "still holds a stage" not in str(e) and "nobody can take stage" not in str(e):
                raise
        end_worker(self.mesh, worker)
        return True

    def _repartition(self, rng: random.Random) -> bool:
        self.wait_whole()
        layers = self.expected_layers()
        cuts = sorted(rng.sample(range(1, layers), self.stages - 1))
        counts = [b - a for a, b in itertools.pairwise([0, *cuts, layers])]
        stagemesh("repartition", ",".join(map(str, counts)), "--url", self.mesh.url)
        return True

    def _scale(self, rng: random.Random) -> bool:
        """A second worker for a stage, or no second one for any."""
        self.wait_whole()
        stage = rng.randrange(self.stages)
        for other in range(self.stages):
            if other != stage:
                stagemesh("scale", str(other), "1", "--url", self.mesh.url)
        try:
            stagemesh("scale", str(stage), str(rng.choice((1, 2, 2))), "--url", self.mesh.url)
        except AssertionError as e:
            # Standbys may have taken stages by now, and workers that are bound to those be what is spare.
            if "more could take it" in str(e):
                return False
            raise
        return True

    # -- afterwards -------------------------------------------------------------------------------------------------

    def expected_layers(self) -> int:
        """Of the model."""
        return int(self.mesh.get("/mesh")["pipelines"][0]["stages"][-1]["layers"]["last"])

    def wait_whole(self) -> dict[str, Any]:
        """Until all of it serves, nobody drains, and every worker that is in no pipeline has layers loaded."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            with contextlib.suppress(OSError):
                seen: dict[str, Any] = self.mesh.get("/mesh")
                states = [w["state"] for w in seen["workers"] if w["state"] != "lost"]
                spare = [w for w in seen["workers"] if w["state"] == "standby" and w.get("layers", {}).get("last")]
                members = {s["worker_id"] for p in seen["pipelines"] for s in p["stages"]}
                serving = all(
                    p["state"] == "PIPELINE_STATE_SERVING" and len(p["stages"]) == self.stages
                    for p in seen["pipelines"]
                )
                whole = serving and "draining" not in states and len(spare) == len(states) - len(members) >= 1
                if seen["ready"] and whole:
                    return seen
            assert time.monotonic() < deadline, f"not whole again:\n{self.mesh.tail(100)}"
            time.sleep(0.05)

    def check(self) -> None:
        """What was promised."""
        history = self.history
        print(f"seed {self.seed}:", history)
        assert not history.wrong, history.wrong[:5]
        assert not history.failed, history.failed[:5]
        assert history.finished > 0


def _difference(stream: streams.Stream, other: streams.Stream) -> str:
    """Where the tokens of a stream part from those it ought to have brought, and how long each had waited then."""
    told = [f"prompt of {len(stream.prompt)}, {stream.params}, longest pause {stream.longest_s:.2f} s"]
    for choice, right in other.tokens.items():
        tokens = stream.tokens.get(choice, [])
        at = next(
            (i for i, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), min(len(tokens), len(right))
        )
        if tokens != right:
            told.append(
                f"choice {choice}: {len(tokens)} of {len(right)}, from {at}: {tokens[at : at + 8]} {right[at : at + 8]}"
            )
    return "; ".join(told)


def descriptors(process: psutil.Process) -> dict[str, int]:
    """How many of each kind a process has open: `socket`, `anon_inode:[eventpoll]`, a path."""
    kinds: Counter[str] = Counter()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kinds[re.sub(r"(socket|pipe):.*", r"\1", os.readlink(link))] += 1
    return dict(kinds)


def held(mesh: Mesh) -> dict[str, dict[str, float]]:
    """What the processes that live through everything hold: the gateway's and the supervisor's."""
    processes = {"gateway": mesh.named("stagemesh gateway")[0], "serve": psutil.Process(mesh.process.pid)}
    return {
        name: {
            "rss_mib": process.memory_info().rss / 2**20,
            "fds": float(process.num_fds()),
            "threads": float(process.num_threads()),
        }
        for name, process in processes.items()
    }
