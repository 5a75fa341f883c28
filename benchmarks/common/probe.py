"""Measures a mesh's CPU time and memory by role. The titles of the mesh's processes contain their roles.

`Probe` samples a running mesh a few times per second. All values are sums (CPU seconds of each process, and the stages'
times in `/metrics`), so values between two samples are interpolated.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

EVERY_S = 0.25
SCRAPE_TIMEOUT_S = 10.0
STAGE = re.compile(r"stagemesh (stage \d+|standby)\b(.*)")
STAGE_SECONDS = re.compile(r"stagemesh_stage_seconds_total\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def role_of(title: str) -> str:
    """Returns `gateway`, `coordinator`, `supervisor`, `forkserver`, `agent of stage 0`, `forkserver of stage 0`,
    `rank 0 of stage 0`, or `other`."""
    stage = STAGE.match(title)
    if stage is not None:
        rank = re.search(r"rank (\d+)", stage[2])
        if "forkserver" in stage[2]:
            return f"forkserver of {stage[1]}"
        return f"rank {rank[1]} of {stage[1]}" if rank else f"agent of {stage[1]}"
    for word in ("gateway", "coordinator", "forkserver", "serve"):
        if title.startswith(f"stagemesh {word}"):
            return "supervisor" if word == "serve" else word
    return "other"


def processes(pid: int) -> list[tuple[str, psutil.Process]]:
    """Returns (role, process) of `pid` and all its descendants."""
    found = []
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            found.append((role_of(" ".join(process.cmdline()).strip()), process))
    return found


def cpu_seconds(members: list[tuple[str, psutil.Process]]) -> dict[str, float]:
    """Returns the CPU seconds used so far, by role. Ended processes do not count."""
    spent: dict[str, float] = {}
    for role, process in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent[role] = spent.get(role, 0.0) + times.user + times.system
    return spent


def pss_mib(process: psutil.Process) -> float:
    """Returns the proportional set size: a shared page counts with its share."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def memory_mib(members: list[tuple[str, psutil.Process]]) -> dict[str, float]:
    """Returns the PSS by role."""
    held: dict[str, float] = {}
    for role, process in members:
        held[role] = held.get(role, 0.0) + pss_mib(process)
    return held


def scrape(base_url: str) -> str:
    """Reads the gateway's metrics."""
    with urllib.request.urlopen(base_url + "/metrics", timeout=SCRAPE_TIMEOUT_S) as response:
        text: str = response.read().decode()
        return text


def sums_of(metrics: str) -> dict[str, float]:
    """Returns `tokens`, `running`, `steps N`, and, for each stage and use of its time, `stage N WHAT` in seconds."""
    sums: dict[str, float] = {}
    for line in metrics.splitlines():
        name, _, value = line.rpartition(" ")
        if name == "stagemesh_generation_tokens_total":
            sums["tokens"] = float(value)
        elif name == "stagemesh_num_requests_running":
            sums["running"] = float(value)
        elif name.startswith("stagemesh_stage_steps_total{"):
            sums[f"steps {dict(LABEL.findall(name))['stage']}"] = float(value)
        elif (match := STAGE_SECONDS.match(line)) is not None:
            labels = dict(LABEL.findall(match[1]))
            sums[f"stage {labels['stage']} {labels['spent_on']}"] = float(match[2])
    return sums


@dataclass(frozen=True)
class Sample:
    """The values at one moment."""

    at: float
    cpu_s: dict[str, float]
    sums: dict[str, float]


@dataclass
class Probe:
    """Samples the mesh of process `pid` and its descendants while the block runs. Skips a sample that fails."""

    pid: int
    base_url: str
    samples: list[Sample] = field(default_factory=list)

    def __enter__(self) -> Probe:
        self._stop = threading.Event()
        self._members = processes(self.pid)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(SCRAPE_TIMEOUT_S + 1.0)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                sums = sums_of(scrape(self.base_url))
                self.samples.append(Sample(time.monotonic(), cpu_seconds(self._members), sums))
            if self._stop.wait(EVERY_S):
                return

    def spent(self, duration_s: float) -> Spent | None:
        """Returns the sums over the last `duration_s` before the last token, or None if no token came."""
        changed = [i for i in range(1, len(self.samples)) if self._tokens(i) > self._tokens(i - 1)]
        if not changed:
            return None
        end = self.samples[changed[-1]].at
        begin = max(self.samples[0].at, end - duration_s)
        first, last = self._at(begin), self._at(end)
        cpu = {role: last.cpu_s[role] - first.cpu_s.get(role, 0.0) for role in last.cpu_s}
        sums = {name: last.sums[name] - first.sums.get(name, 0.0) for name in last.sums}
        return Spent(end - begin, cpu, sums)

    def _tokens(self, index: int) -> float:
        return self.samples[index].sums.get("tokens", 0.0)

    def _at(self, at: float) -> Sample:
        """Returns the interpolated sample at time `at`."""
        after = next((i for i, sample in enumerate(self.samples) if sample.at >= at), len(self.samples) - 1)
        b, a = self.samples[after], self.samples[max(0, after - 1)]
        share = (at - a.at) / (b.at - a.at) if b.at > a.at else 1.0

        def between(x: dict[str, float], y: dict[str, float]) -> dict[str, float]:
            return {key: x.get(key, y[key]) + share * (y[key] - x.get(key, y[key])) for key in y}

        return Sample(at, between(a.cpu_s, b.cpu_s), between(a.sums, b.sums))


@dataclass(frozen=True)
class Spent:
    """CPU seconds by role, and differences of the sums in `/metrics`, of one period."""

    seconds: float
    cpu_s: dict[str, float]
    sums: dict[str, float]

    @property
    def stages(self) -> dict[int, dict[str, float]]:
        """Seconds of each stage by what they were spent on (`wait_input`, `compute`, `wait_send`)."""
        stages: dict[int, dict[str, float]] = {}
        for name, value in self.sums.items():
            if (match := re.fullmatch(r"stage (\d+) (.+)", name)) is not None:
                stages.setdefault(int(match[1]), {})[match[2]] = value
        return stages

    @property
    def busiest(self) -> float:
        """Share of the period in which the busiest stage computed."""
        return max((stage.get("compute", 0.0) for stage in self.stages.values()), default=0.0) / self.seconds

    @property
    def outside_ranks(self) -> float:
        """Share of the CPU seconds that processes other than ranks used."""
        total = sum(self.cpu_s.values())
        ranks = sum(spent for role, spent in self.cpu_s.items() if role.startswith("rank "))
        return 1.0 - ranks / total if total else 0.0

    def not_compute(self) -> float:
        """Returns the share of CPU seconds outside the ranks' steps. It is valid if each rank computes on one thread.

        A step counts with the CPU time of its rank. During the rest of the step, another process had the core.
        """
        total = sum(self.cpu_s.values())
        compute = 0.0
        for role, spent in self.cpu_s.items():
            if (match := re.fullmatch(r"rank \d+ of stage (\d+)", role)) is not None:
                compute += min(spent, self.stages.get(int(match[1]), {}).get("compute", 0.0))
        return 1.0 - compute / total if total else 0.0
