"""Samples the CPU time of a mesh on this machine from /proc, by role, while a trace is taken."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from .records import Trace

SAMPLE_S = 0.1
TITLE = "stagemesh "
MAX_SAMPLES = 20_000


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds by role, during a part of the trace."""

    wall_s: float
    seconds: dict[str, float]
    compute_s: float
    """CPU seconds that the ranks spent on steps."""
    tokens: int
    """Tokens generated in that part."""

    @property
    def total_s(self) -> float:
        """CPU seconds of all roles."""
        return sum(self.seconds.values())

    @property
    def non_compute_share(self) -> float:
        """Share of the CPU time that was not spent on computing steps; at least 0."""
        return max(0.0, 1 - self.compute_s / self.total_s) if self.total_s else float("nan")


class CpuSampler:
    """Samples the CPU time of all processes of one `stagemesh serve`."""

    def __init__(self, processes: dict[int, str]) -> None:
        self._processes = processes
        self._samples: list[tuple[float, dict[int, float]]] = []

    @property
    def gateways(self) -> set[int]:
        """Process ids of the gateways."""
        return {pid for pid, role in self._processes.items() if role == "gateway"}

    async def run(self) -> None:
        """Samples until cancelled."""
        while len(self._samples) < MAX_SAMPLES:
            self._samples.append((time.monotonic_ns() / 1000, {pid: cpu_s(pid) for pid in self._processes}))
            await asyncio.sleep(SAMPLE_S)

    def use(self, trace: Trace) -> CpuUse | None:
        """CPU time between the first and the last sample in the trace; None when the trace is too short for two
        samples."""
        begin_us = min(step.planned_us for step in trace.steps)
        end_us = max(step.delivered_us for step in trace.steps)
        within = [sample for sample in self._samples if begin_us <= sample[0] <= end_us]
        if len(within) < 2:
            return None
        (first_us, before), (last_us, after) = within[0], within[-1]
        seconds: dict[str, float] = {}
        for pid, role in self._processes.items():
            seconds[role] = seconds.get(role, 0.0) + max(0.0, after[pid] - before[pid])
        compute_us, tokens = 0.0, 0
        for step in trace.steps:
            tokens += len(step.sampled) if first_us <= step.received_us <= last_us else 0
            for info, t in zip(trace.stages, step.stages, strict=True):
                # A step at the edge counts in part. One rank reports for all ranks of a stage, which do the same work.
                inside = max(0.0, min(t.ended_us, last_us) - max(t.began_us, first_us))
                compute_us += t.compute_cpu_us * info.tp_size * inside / max(1.0, t.ended_us - t.began_us)
        return CpuUse((last_us - first_us) * 1e-6, dict(sorted(seconds.items())), compute_us * 1e-6, tokens)


def local_mesh(listening_port: int) -> CpuSampler | None:
    """A sampler for the mesh whose gateway listens on this port of this machine; None when there is no such mesh.

    Only processes that `serve` started are known to belong together.
    """
    gateway = _listener(listening_port)
    if gateway is None or _title(gateway) != "gateway":
        return None
    root = _parent(gateway)
    if root is None or _title(root) != "serve":
        return None
    children: dict[int, list[int]] = {}
    for pid in _pids():
        parent = _parent(pid)
        if parent is not None:
            children.setdefault(parent, []).append(pid)
    roles: dict[int, str] = {}
    pending = [root]
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        title = _title(pid)
        if title is not None:
            is_agent = title.startswith("stage") and not {"rank", "forkserver"} & set(title.split())
            roles[pid] = f"{title} agent" if is_agent else title
    return CpuSampler(roles)


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far; 0 when it is gone."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (its third); empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _title(pid: int) -> str | None:
    """What follows `stagemesh ` in a process's title; None for other processes."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    return line[len(TITLE) :] if line.startswith(TITLE) else None


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _listener(port: int) -> int | None:
    """The gateway process that listens on a TCP port of this machine."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for pid in _pids():
        if _title(pid) != "gateway":
            continue
        try:
            if any(os.readlink(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd")):
                return pid
        except OSError:
            continue
    return None
