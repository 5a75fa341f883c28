"""Round trips of activations between two processes, over UCX and TCP: p50 and p99 by message size.

    python -m benchmarks.links [--rounds 1000] [--repeats 3] [--json FILE]

Each transport is measured several times in turn. The run with the lowest median is reported, because other work on the
machine only makes a run slower. `--real-time` (needs root) keeps such work off the two cores.

Each side drives its transport as a rank does: it spins for 50 microseconds, then arms and sleeps. The figures include
all work of a link: post, credit, release.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import Transport, open_transport

HIDDEN = 512  # 1 KiB per row in bf16.
SIZES_KIB = {1: 1, 16: 16, 96: 96, 1024: 1024}
SPIN_S = 50e-6
TIMEOUT_S = 60.0
UCX_OVER_TCP = {"TLS": "tcp", "NET_DEVICES": "lo"}
WARM_UP = 100
CARRIED = HIDDEN, torch.bfloat16, 2, max(SIZES_KIB.values())
"""Hidden size, dtype, credits and largest number of rows of both links."""


class Side:
    """A transport with one link in each direction, driven as an engine drives it."""

    def __init__(self, kind: str) -> None:
        options = UCX_OVER_TCP if kind == "ucx-tcp" else None
        self.transport: Transport = open_transport(kind.partition("-")[0], ucx_options=options)
        self._poller = select.poll()
        for fd, events in self.transport.fds():
            self._poller.register(fd, events)

    def join(self, remote: bytes, outgoing: LinkIdentity, incoming: LinkIdentity) -> None:
        self.receiver = LinkReceiver(self.transport, remote, incoming, timeout_s=TIMEOUT_S)
        self.sender = LinkSender(self.transport, remote, outgoing, timeout_s=TIMEOUT_S)
        self.receiver.open_lane(0)
        self.sender.open_lane(0)
        self.drive(lambda: self.sender.up and self.receiver.up)

    def drive(self, until: Callable[[], bool]) -> None:
        spin_until = time.perf_counter() + SPIN_S
        deadline = time.monotonic() + TIMEOUT_S
        while not until():
            happened = self.transport.progress()
            happened |= self.sender.progress()
            happened |= self.receiver.progress()
            if happened:
                spin_until = time.perf_counter() + SPIN_S
            elif time.perf_counter() > spin_until:
                error = self.sender.error or self.receiver.error
                if error is not None or time.monotonic() > deadline:
                    raise error or TimeoutError("nothing came")
                if self.transport.arm():
                    self._poller.poll(1000)

    def send(self, step: int, tensor: torch.Tensor) -> None:
        self.drive(lambda: self.sender.can_send(0))
        self.sender.send(0, step, tensor)

    def take(self, step: int) -> None:
        self.drive(lambda: self.receiver.ready(0, step) is not None)
        self.receiver.release(0, step)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.transport.close()


def steps(rounds: int) -> list[tuple[int, int]]:
    """Returns (step, rows) of the whole run. Both sides compute the same list."""
    plan = [rows for rows in SIZES_KIB.values() for _ in range(WARM_UP + rounds)]
    return list(enumerate(plan))


def child(kind: str, rounds: int, real_time: bool) -> None:
    """Runs the other process, which sends every frame back."""
    torch.set_num_threads(1)
    side = Side(kind)
    print(side.transport.address().hex(), flush=True)
    told = json.loads(sys.stdin.readline())
    there, back = (LinkIdentity(n, 1, bytes.fromhex(told["secret"]), *CARRIED) for n in told["nonces"])
    side.join(bytes.fromhex(told["address"]), back, there)
    settle(1, real_time)
    replies = {rows: torch.ones(rows, HIDDEN, dtype=torch.bfloat16) for rows in SIZES_KIB.values()}
    plan = steps(rounds)
    side.receiver.post(0, *_announce(plan[0]))
    for i, (step, rows) in enumerate(plan):
        side.take(step)
        side.send(step, replies[rows])
        if i + 1 < len(plan):
            side.receiver.post(0, *_announce(plan[i + 1]))  # The plan of the next step is known now.
    side.drive(lambda: side.sender.unconsumed(0) == 0 or side.sender.error is not None)  # The last reply was taken.
    side.close()


def settle(core: int, real_time: bool) -> None:
    """Pins this side to its own core: two sides that spin on one core would measure the scheduler."""
    cores = sorted(os.sched_getaffinity(0))
    if core < len(cores):
        os.sched_setaffinity(0, {cores[core]})
    if real_time:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))


def _announce(step: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return step[0], (step[1], HIDDEN)


def measure(kind: str, rounds: int, real_time: bool) -> dict[str, Any]:
    """Measures round trips over one kind of transport."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--child", kind, "--rounds", str(rounds)]
        + ["--real-time"] * real_time,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    every_core = os.sched_getaffinity(0)
    try:
        side = Side(kind)
        remote = bytes.fromhex(process.stdout.readline())
        secret, nonces = os.urandom(16), [int.from_bytes(os.urandom(4)) for _ in range(2)]
        told = {"address": side.transport.address().hex(), "secret": secret.hex(), "nonces": nonces}
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()
        there, back = (LinkIdentity(nonce, 1, secret, *CARRIED) for nonce in nonces)
        side.join(remote, there, back)
        settle(0, real_time)
        took_us: dict[int, list[float]] = {rows: [] for rows in SIZES_KIB.values()}
        tensors = {rows: torch.ones(rows, HIDDEN, dtype=torch.bfloat16) for rows in SIZES_KIB.values()}
        for step, rows in steps(rounds):
            side.receiver.post(0, step, (rows, HIDDEN))
            began = time.perf_counter()
            side.send(step, tensors[rows])
            side.take(step)
            took_us[rows].append((time.perf_counter() - began) * 1e6)
        route = side.sender.route
        side.close()
        process.wait(TIMEOUT_S)
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, every_core)
        if process.poll() is None:
            process.kill()
            process.wait(TIMEOUT_S)
    trips: dict[str, dict[str, float]] = {}
    for kib, rows in SIZES_KIB.items():
        figures = statistics.quantiles(took_us[rows][WARM_UP:], n=100)
        trips[f"{kib} KiB"] = {"p50_us": round(figures[49], 1), "p99_us": round(figures[98], 1)}
    return {"transport": kind, "route": route, "round_trip": trips}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the run with the lowest median for each size."""
    sizes = runs[0]["round_trip"]
    trips = {size: min((run["round_trip"][size] for run in runs), key=lambda trip: trip["p50_us"]) for size in sizes}
    return runs[0] | {"round_trip": trips}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.rounds, arguments.real_time)
        return
    torch.set_num_threads(1)
    kinds = ("ucx", "ucx-tcp", "tcp")
    runs = [measure(kind, arguments.rounds, arguments.real_time) for _ in range(arguments.repeats) for kind in kinds]
    results = [best([run for run in runs if run["transport"] == kind]) for kind in kinds]
    machine: dict[str, object] = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    machine["bf16 units"] = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    machine |= {"repeats": arguments.repeats, "real-time priority": arguments.real_time}
    machine["load before"] = round(os.getloadavg()[0], 1)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"rounds": arguments.rounds, **machine, "results": results}, indent=2) + "\n"
        )
    print("| transport | route | " + " | ".join(f"{kib} KiB p50 (p99)" for kib in SIZES_KIB) + " |")
    print("| --- | --- | " + " | ".join("---" for _ in SIZES_KIB) + " |")
    for result in results:
        cells = [f"{t['p50_us']:.0f} us ({t['p99_us']:.0f})" for t in result["round_trip"].values()]
        print(f"| {result['transport']} | {result['route']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
