"""A model that takes long to describe: workers wait for the process that does it, and nobody takes them for hanging."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mesh import find_addresses, serve
from services import Service, mesh_of, service, wait_ready

from stagemesh.stage_worker.native import ops

pytestmark = pytest.mark.skipif(
    ops.library() is None, reason="NO COMPILED KERNELS: not built, or a processor without AVX512-BF16"
)
PROCESS = "native.description.process"


def describers(root: psutil.Process) -> list[psutil.Process]:
    """Processes that describe a model, below `root`."""
    found = []
    for child in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if PROCESS in " ".join(child.cmdline()):
                found.append(child)
    return found


def hold(root: psutil.Process, seconds: float, log: Callable[[], str]) -> None:
    """Stops the process that describes a model for a while."""
    deadline = time.monotonic() + 60
    while not (found := describers(root)):
        assert time.monotonic() < deadline, log()
        time.sleep(0.01)
    assert len(found) == 1, "one describes, the others wait for its answer"
    found[0].send_signal(signal.SIGSTOP)
    # For as long as it stands still nothing happens, and so it is the time that is waited for.
    time.sleep(seconds)
    assert [p.pid for p in describers(root)] == [found[0].pid], log()
    found[0].send_signal(signal.SIGCONT)


def test_workers_wait_for_it(tmp_path: Path) -> None:
    with serve("-pp", "2", wait=False, env={"XDG_CACHE_HOME": str(tmp_path)}) as mesh:
        hold(psutil.Process(mesh.process.pid), 6.0, mesh.tail)
        find_addresses(mesh)
        mesh.wait_ready()
        assert mesh.log.read_text().count("run through compiled kernels") == 2
        assert "does not go on" not in mesh.log.read_text()


def test_workers_that_learn_late_which_model_it_is_wait_for_it(tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> Service:
            return stack.enter_context(service(tmp_path, *args, "--time-scale", "0.5", env=env))

        coordinator = start("coordinator", "--port", "0", "-pp", "1")
        address = ["--coordinator", f"127.0.0.1:{coordinator.ports['port']}"]
        stage = start("stage", *address, "--stage", "0", "--threads", "1")
        gateway = start("gateway", *address, "--port", "0", "--grpc-port", "0")
        (log,) = tmp_path.glob("stage-*.log")
        hold(psutil.Process(stage.process.pid), 9.0, log.read_text)
        wait_ready(gateway)
        assert mesh_of(gateway)["pipelines"][0]["epoch"] == "1"
        assert "run through compiled kernels" in log.read_text()
        assert "hangs" not in log.read_text()
