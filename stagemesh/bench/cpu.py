"""Samples the CPU time of a mesh on this machine from /proc, by role, while a trace is taken."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from stagemesh import process

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
    """Samples the CPU time of all processes of stagemesh that run on this machine now."""

    def __init__(self) -> None:
        self._processes = _processes()
        self._samples: list[tuple[float, dict[int, float]]] = []

    async def run(self) -> None:
        """Samples until cancelled."""
        while len(self._samples) < MAX_SAMPLES:
            self._samples.append((time.monotonic_ns() / 1000, {pid: cpu_s(pid) for pid in self._processes}))
            await asyncio.sleep(SAMPLE_S)

    def use(self, trace: Trace) -> CpuUse | str:
        """CPU time of the traced mesh between the first and the last sample in the trace, or why it is not known."""
        roles = self._roles(trace)
        if not roles:
            return "only of a mesh that `stagemesh serve` started on this machine"
        begin_us = min(step.planned_us for step in trace.steps)
        end_us = max(step.delivered_us for step in trace.steps)
        within = [sample for sample in self._samples if begin_us <= sample[0] <= end_us]
        if len(within) < 2:
            return f"the trace is shorter than two samples, {SAMPLE_S} s apart"
        (first_us, before), (last_us, after) = within[0], within[-1]
        seconds = dict.fromkeys(sorted(roles.values()), 0.0)
        for pid, role in roles.items():
            seconds[role] += max(0.0, after[pid] - before[pid])
        compute_us, tokens = 0.0, 0
        for step in trace.steps:
            tokens += len(step.sampled) if first_us <= step.received_us <= last_us else 0
            for info, t in zip(trace.stages, step.stages, strict=True):
                # A step at the edge counts in part. One rank reports for all ranks of a stage, which do the same work.
                inside = max(0.0, min(t.ended_us, last_us) - max(t.began_us, first_us))
                compute_us += t.compute_cpu_us * info.tp_size * inside / max(1.0, t.ended_us - t.began_us)
        return CpuUse((last_us - first_us) * 1e-6, seconds, compute_us * 1e-6, tokens)

    def _roles(self, trace: Trace) -> dict[int, str]:
        """Returns process -> role for the traced mesh, or nothing if `serve` did not start it on this machine.

        Only processes that `serve` started are known to belong together.
        """
        root, title = self._processes.get(trace.gateway_pid, (0, ""))
        if trace.boot_id != process.boot_id() or title != "gateway" or self._processes.get(root, (0, ""))[1] != "serve":
            return {}
        found = {root}
        while more := {pid for pid, (parent, _) in self._processes.items() if parent in found} - found:
            found |= more
        return {pid: _role(self._processes[pid][1]) for pid in found}


def cpu_s(pid: int) -> float:
    """Returns the user and system seconds of a process so far, or 0 if it is gone."""
    try:
        fields = _stat(pid)
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the state (the third) on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processes() -> dict[int, tuple[int, str]]:
    """Returns process -> (parent, title without `stagemesh `), for all processes with such a title."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if title.startswith(TITLE):
                found[int(path.name)] = int(_stat(int(path.name))[1]), title.removeprefix(TITLE)
        except OSError:
            continue  # It has just ended.
    return found


def _role(title: str) -> str:
    is_agent = title.startswith("stage") and not {"rank", "forkserver"} & set(title.split())
    return f"{title} agent" if is_agent else title
