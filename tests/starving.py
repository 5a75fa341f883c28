"""Processes that get next to no core, without a load on the machine: a control group that may use little."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PERIOD_US, QUOTA_US, RIVALS = 1_000_000, 4_000, 20
"""A hundredth of a core, for two at most at a time of those that want it."""
FREE = {"cpu.cfs_quota_us": "-1", "cpu.max": "max"}


@contextlib.contextmanager
def starving(*pids: int) -> Iterator[None]:
    """Each of the processes gets a few milliseconds of a core every ten seconds or so."""
    group = _make_group()
    rivals: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(RIVALS):
            rivals.append(
                subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
            )
        for rival in rivals:
            assert rival.stdout is not None
            rival.stdout.readline()
        for pid in [*(rival.pid for rival in rivals), *pids]:
            (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for name, value in FREE.items():
            if (group / name).exists():
                (group / name).write_text(value)  # Who has no core does not even end.
        for rival in rivals:
            rival.kill()
        for rival in rivals:
            rival.wait()
            assert rival.stdout is not None
            rival.stdout.close()
        for pid in pids:
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _make_group() -> Path:
    """In the first hierarchy that lets us; skips the test where none does."""
    limits_v1 = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(QUOTA_US)}
    limits_v2 = {"cpu.max": f"{QUOTA_US} {PERIOD_US}"}
    for root, limits in ((Path("/sys/fs/cgroup/cpu"), limits_v1), (Path("/sys/fs/cgroup"), limits_v2)):
        group = root / f"stagemesh-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            if "cpu.max" in limits:
                (root / "cgroup.subtree_control").write_text("+cpu")
            group.mkdir()
            for name, value in limits.items():
                (group / name).write_text(value)
            return group
        with contextlib.suppress(OSError):
            group.rmdir()
    pytest.skip("NOBODY STARVES HERE: this user may not make a control group of processes")


def waited_s(pid: int) -> float:
    """For how long the threads of a process have waited for a core so far, as far as those waits are over."""
    found = [task.read_text().split()[1] for task in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return max(map(int, found)) / 1e9
