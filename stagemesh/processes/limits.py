"""The memory and the cores that this process may use.

In a container, /proc/meminfo and the set of cores are those of the whole machine. Limits are in the files of the
process's control group (cgroup) and of each group around it; the tightest one counts. Version 1 of control groups has
a tree of folders for each controller, version 2 has one tree, and a machine can have both.

The folders of /proc and of the control groups are arguments, so that tests can write their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cores:
    """Cores of a process."""

    ids: tuple[int, ...]
    """Cores on which it may run."""
    count: int
    """Number of threads that can run all the time. Under a CPU limit it can be less than the number of `ids`."""


def own_cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> Cores:
    """Returns the cores of this process.

    A limit of 2.5 CPUs counts as 2, because the kernel would stop three busy threads together in each period.
    """
    ids = tuple(sorted(os.sched_getaffinity(0)))
    limits = [cpus for group in _groups(proc, cgroups, "cpu") if (cpus := _cpu_limit(group)) is not None]
    return Cores(ids, max(1, int(min([len(ids), *limits]))))


def available_memory_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Returns the bytes that this process can allocate. Caches that the kernel would give back count as free."""
    free = [_fields(proc / "meminfo")["MemAvailable:"] * 1024]
    free += [left for group in _groups(proc, cgroups, "memory") if (left := _memory_left(group)) is not None]
    return max(0, min(free))


def _groups(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control group and of the groups around it. Not all of them exist.

    A container without a namespace of its own has the host's path, but its own group is mounted, at the root.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            trees = [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            trees = [cgroups / controllers, cgroups / controller]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # It is outside of what is mounted.
            group = PurePosixPath()
        yield from (tree / part for tree in trees for part in (group, *group.parents))


def _memory_left(group: Path) -> int | None:
    """Returns the bytes between the use of a memory group and its limit, or None if it has no limit.

    A group's use includes page cache. Like kubelet, this counts cache that is not active as free. A checkpoint that was
    read twice is active cache, so that counts, too, except for mapped files: the code of running programs is there.
    """
    limits = _numbers(group, "memory.max", "memory.high", "memory.limit_in_bytes")
    used = _numbers(group, "memory.current", "memory.usage_in_bytes")
    if not limits or not used:
        return None
    stat = _fields(group / "memory.stat")
    total = "total_" if "total_inactive_file" in stat else ""  # In version 1, other fields leave out inner groups.
    inactive, active, slab, *mapped = (
        stat.get(total + name, 0)
        for name in ("inactive_file", "active_file", "slab_reclaimable", "file_mapped", "mapped_file")
    )
    cache = inactive + max(0, active - sum(mapped)) + slab
    return min(limits) - max(0, used[0] - cache)


def _cpu_limit(group: Path) -> float | None:
    """Returns the limit of a CPU group in CPUs, or None if it has none."""
    words = _text(group / "cpu.max").split()
    words = words or [_text(group / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    # Without a limit the quota is `max` or -1.
    return int(words[0]) / int(words[1]) if all(word.isdigit() for word in words) else None


def _numbers(group: Path, *names: str) -> list[int]:
    """Returns the contents of those files that exist and hold a number (not `max`)."""
    return [int(text) for name in names if (text := _text(group / name).strip()).isdigit()]


def _fields(path: Path) -> dict[str, int]:
    """Returns a file of lines "name number" as a dictionary."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    """Returns a file's content, or nothing if it does not exist or cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
