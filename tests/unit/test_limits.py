"""The memory and cores that a process finds it may use, in control groups of both versions, nested and not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stagemesh.processes.limits import available_memory_bytes, own_cores
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.messages.rank_config import RankConfig
from stagemesh.stage_worker.rank.measure import measure

GIB = 1 << 30
MACHINE = 64 * GIB
UNLIMITED_V1 = 9223372036854771712

Files = dict[str, str | int]


class Machine:
    """A machine with 64 GiB of free memory, whose /proc and control groups a test writes."""

    def __init__(self, folder: Path, membership: str) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(membership)
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {MACHINE // 1024} kB\nHugePages_Free: 0\n")

    def group(self, path: str, files: Files) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")

    @property
    def memory_gib(self) -> float:
        return available_memory_bytes(self.proc, self.cgroups) / GIB

    @property
    def cores(self) -> int:
        return own_cores(self.proc, self.cgroups).count


def stat(**gib: float) -> str:
    return "\n".join(f"{name} {int(size * GIB)}" for name, size in {"anon": 0, **gib}.items())


def memory(version: int, limit: int | str, used: float, **cache: float) -> Files:
    if version == 2:
        return {"memory.max": limit, "memory.current": int(used * GIB), "memory.stat": stat(**cache)}
    names = {"file_mapped": "mapped_file"}
    totals = {f"total_{names.get(name, name)}": size for name, size in cache.items()}
    # What is not a total leaves out the groups within.
    text = stat(inactive_file=0, active_file=0, mapped_file=0, **totals)
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": int(used * GIB), "memory.stat": text}


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def machine(folder: Path, version: int, path: str) -> tuple[Machine, str]:
    """A machine where this process is in the group `path`, and the folder of its memory groups."""
    membership = f"0::{path}\n" if version == 2 else f"12:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:/\n0::/\n"
    return Machine(folder, membership), "" if version == 2 else "memory/"


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({}, 0.1),
        ({"inactive_file": 3.5}, 3.6),  # A checkpoint that was read once.
        ({"inactive_file": 1.0, "active_file": 2.5, "file_mapped": 0.25}, 3.35),  # Read twice; libraries are mapped.
        ({"active_file": 0.2, "file_mapped": 0.25}, 0.1),
        ({"inactive_file": 5.0}, 4.0),
    ],
)
def test_cache_that_can_be_given_back_is_free(
    tmp_path: Path, version: int, cache: dict[str, float], expected: float
) -> None:
    host, tree = machine(tmp_path, version, "/")
    host.group(tree, memory(version, 4 * GIB, 3.9, **cache))
    assert host.memory_gib == pytest.approx(expected, abs=1e-6)


def test_kernel_caches_are_free_as_far_as_they_can_be_given_back(tmp_path: Path) -> None:
    host, tree = machine(tmp_path, 2, "/")
    host.group(tree, memory(2, 4 * GIB, 3.9, slab_reclaimable=0.5, slab_unreclaimable=0.25))
    assert host.memory_gib == pytest.approx(0.6, abs=1e-6)


def test_the_tightest_group_counts(tmp_path: Path, version: int) -> None:
    """A pod's limit lies around its containers', as systemd's slices lie around services."""
    host, tree = machine(tmp_path, version, "/pods/pod/container")
    unlimited: Any = "max" if version == 2 else UNLIMITED_V1
    host.group(f"{tree}pods/pod/container", memory(version, unlimited, 1.0))
    assert host.memory_gib == pytest.approx(64)
    host.group(f"{tree}pods/pod", memory(version, 8 * GIB, 6.0, inactive_file=1.0))
    assert host.memory_gib == pytest.approx(3)
    host.group(f"{tree}pods", memory(version, 32 * GIB, 31.0))
    assert host.memory_gib == pytest.approx(1)
    host.group(f"{tree}pods/pod/container", memory(version, GIB, 0.5))
    assert host.memory_gib == pytest.approx(0.5)
    host.group(f"{tree}pods/pod/other", memory(version, GIB, 1.0))
    assert host.memory_gib == pytest.approx(0.5)


@pytest.mark.parametrize("path", ["/docker/0123", "/../other", "/"])
def test_a_container_finds_its_limit_at_the_root_whatever_its_path(tmp_path: Path, version: int, path: str) -> None:
    """Without a cgroup namespace the path is the host's. With one, a process from outside has a path that leaves it."""
    host, tree = machine(tmp_path, version, path)
    host.group(tree, memory(version, 4 * GIB, 1.0))
    host.group(f"{tree}../other", memory(version, GIB, 1.0))
    assert host.memory_gib == pytest.approx(3)


def test_use_beyond_a_limit_leaves_nothing(tmp_path: Path, version: int) -> None:
    host, tree = machine(tmp_path, version, "/")
    host.group(tree, memory(version, 4 * GIB, 4.5))
    assert host.memory_gib == 0


def test_a_limit_at_which_the_kernel_throttles_counts(tmp_path: Path) -> None:
    host, tree = machine(tmp_path, 2, "/")
    host.group(tree, {**memory(2, 4 * GIB, 1.0), "memory.high": 2 * GIB})
    assert host.memory_gib == pytest.approx(1)


@pytest.mark.parametrize("membership", ["", "0::/\n"])
def test_without_control_groups_the_machine_counts(tmp_path: Path, membership: str) -> None:
    host = Machine(tmp_path, membership)
    assert host.memory_gib == pytest.approx(64)
    assert host.cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("quota", "expected"), [(100_000, 1), (50_000, 1), (190_000, 1), (10_000_000, None)])
def test_a_cpu_limit_counts_as_whole_cores(tmp_path: Path, version: int, quota: int, expected: int | None) -> None:
    host, _ = machine(tmp_path, version, "/pods/container")
    if version == 2:
        host.group("pods/container", {"cpu.max": "max 100000"})
        host.group("pods", {"cpu.max": f"{quota} 100000"})
    else:
        host.group("cpu,cpuacct/pods/container", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000})
        host.group("cpu,cpuacct/pods", {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 100_000})
    assert host.cores == (expected or len(os.sched_getaffinity(0)))


def test_both_versions_at_once_are_both_read(tmp_path: Path) -> None:
    """Controllers of a hybrid machine can be in either tree."""
    host = Machine(tmp_path, "4:memory:/a\n0::/b\n")
    host.group("memory/a", memory(1, 8 * GIB, 1.0))
    host.group("unified/b", {"cpu.max": "50000 100000"})
    assert host.memory_gib == pytest.approx(7)
    assert host.cores == 1


def test_ranks_of_a_worker_divide_its_cores() -> None:
    cores = own_cores().count
    settings = StageSettings(coordinator="here:1", tensor_parallel_size=2)
    assert [c.compute_threads for c in RankConfig.of_worker("w", settings, "cpu")] == [max(1, cores // 2)] * 2


def test_ranks_of_a_worker_divide_its_memory_and_their_device_is_named_by_its_threads() -> None:
    one, four = (measure(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert 0.2 < four.memory_bytes / one.memory_bytes < 0.3
    assert one.name.endswith(f" x{torch.get_num_threads()}")


def test_a_service_starts_no_thread_for_each_core_of_the_machine() -> None:
    code = (
        "from stagemesh.cli.service import run_function, settings_class; "
        "settings_class('coordinator'); run_function('coordinator'); "
        "import os; print(len(os.listdir('/proc/self/task')))"
    )
    env = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "1"
