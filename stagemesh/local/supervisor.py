"""`stagemesh serve`: a whole mesh on this machine. Its processes communicate as on separate machines.

The supervisor starts a coordinator, one worker for each stage and a gateway. It shows their progress, restarts
processes that die, and ends them all on a signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagemesh import process
from stagemesh.checkpoint import read_config
from stagemesh.cli.service import USAGE_ERROR
from stagemesh.errors import ConfigError, Unavailable, ungrouped
from stagemesh.fetch import fetch_json
from stagemesh.hub.checkpoint import open_model
from stagemesh.hub.reference import parse
from stagemesh.hub.timing import HubTiming
from stagemesh.models.support import check_heads, heads_to_divide
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.processes.orphans import adopt_orphans, reap_orphans
from stagemesh.protos.v1.processes_pb2 import Call
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.stage import StageSettings, device_kind

from .children import Child
from .plan import LOOPBACK, coordinator_settings, gateway_settings, standby_settings, worker_settings
from .progress import Progress, banner
from .timing import ServeTiming

WORKER_IMPORTS = "stagemesh.stage_worker.main:preload"


def run(settings: ServeSettings) -> int:
    """Serves until SIGTERM or Ctrl-C. Returns the exit status.

    Raises ConfigError if the mesh cannot be built, CheckpointError if the model cannot be read, and Unavailable if the
    hub does not answer.
    """
    folder = Path(settings.model)
    if (hub := parse(settings.model, settings.revision)) is not None:
        found = open_model(hub, HubTiming().scaled(settings.time_scale))
        folder = found.fetch_text()  # The gateway has a deadline, a download has none.
        # All services take the commit that the revision names now.
        settings = settings.model_copy(update={"model": hub.repo, "revision": found.model.revision})
    heads = heads_to_divide(read_config(folder))
    for size in settings.tp_sizes:
        check_heads(heads, size)
    process.set_title("serve")
    adopt_orphans()
    # All children inherit this. They are in this session, but not in the terminal's foreground, so `stty tostop` would
    # stop them when they write.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    process.set_up_logging("serve")
    return asyncio.run(_Supervisor(settings).run())


class _Supervisor:
    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.children: list[Child] = []
        self._gateway: Child
        self._was_ready = False
        """Whether the mesh has ever been ready."""
        self.started_at = time.monotonic()
        self.timing = ServeTiming().scaled(settings.time_scale)
        # On a terminal, bars and the banner are enough. Otherwise the services' own log lines are shown.
        quiet = sys.stderr.isatty() and "STAGEMESH_LOG_LEVEL" not in os.environ
        imports = None
        if sys.platform == "linux" and device_kind(settings.device) == "cpu":
            like = max(worker_settings(settings, ""), key=lambda worker: worker.tensor_parallel_size)
            imports = Call(function=WORKER_IMPORTS, argument=like.model_dump_json().encode())
        self._forks = imports is not None
        self.launcher = Launcher(
            "",
            LaunchTiming().scaled(settings.time_scale),
            imports=imports,
            own_groups=True,
            env={"STAGEMESH_LOG_LEVEL": "WARNING"} if quiet else {},
        )

    async def run(self) -> int:
        """Serves until a signal cancels this task. Returns the exit status."""
        serving = asyncio.current_task()
        assert serving is not None
        self._on_signals(serving.cancel)
        with tempfile.TemporaryDirectory(prefix="stagemesh-serve-") as state_dir, ungrouped():
            try:
                with contextlib.suppress(asyncio.CancelledError):  # A signal ends the service.
                    await self._serve(state_dir)
            finally:
                self._on_signals(lambda: None)  # The end has already begun.
                await self._end()
        return 0

    @staticmethod
    def _on_signals(handle: Callable[[], object]) -> None:
        for sig in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sig, handle)

    async def _serve(self, state_dir: str) -> None:
        coordinator = self._child("coordinator", "coordinator", coordinator_settings(self.settings, state_dir))
        # The forkserver starts beside the coordinator, because its imports take longest.
        self.launcher.begin()
        await coordinator.start()
        address = f"{LOOPBACK}:{coordinator.ports['port']}"
        self._gateway = self._child("gateway", "gateway", gateway_settings(self.settings, address))
        # It refuses a checkpoint whose tokenizer or chat template is broken: before any worker loads weights. Meanwhile
        # the forkserver imports what workers need.
        await self._gateway.start()
        async with asyncio.TaskGroup() as group:
            for settings in worker_settings(self.settings, address):
                group.create_task(self._worker(settings).start())
        async with asyncio.TaskGroup() as group:
            for child in self.children:
                group.create_task(self._keep(child))
            group.create_task(self._reap())
            await self._until_ready()
            self._was_ready = True
            # Standbys start last. Earlier, one could take a stage whose worker registers a moment later.
            for settings in standby_settings(self.settings, address):
                group.create_task(self._keep(self._worker(settings)))

    def _worker(self, settings: StageSettings) -> Child:
        return self._child("stage", f"worker {settings.worker_id}", settings, forked=self._forks)

    def _child(self, role: str, label: str, settings: Any, *, forked: bool = False) -> Child:
        child = Child(role, label, settings, self.launcher, self.timing, forked)
        self.children.append(child)
        return child

    async def _reap(self) -> None:
        """Reaps orphans: when an agent was killed, its ranks become children of this process."""
        while True:
            self.launcher.reap()
            await asyncio.sleep(self.timing.watch_s)

    async def _keep(self, child: Child) -> None:
        """Starts a child that does not run yet, and starts it again whenever it dies.

        Raises ConfigError if a restart would not help: it refuses its settings or the checkpoint, with which it has
        never served.
        """
        while True:
            if not child.alive:
                served_before = self._was_ready and child.ports
                if child.process is not None and child.process.returncode == USAGE_ERROR and not served_before:
                    raise ConfigError(f"the {child.label} cannot serve; its message is above")
                await child.restart()
            await asyncio.sleep(self.timing.watch_s)

    async def _until_ready(self) -> None:
        host = self.settings.host if self.settings.host not in ("0.0.0.0", "::") else LOOPBACK
        url = f"http://{host}:{self._gateway.ports['port']}"
        deadline = time.monotonic() + self.settings.start_timeout
        mesh: dict[str, Any] = {"ready": False, "reason": "the gateway does not answer"}
        fetched = 0
        with contextlib.closing(Progress()) as progress:
            while True:
                with contextlib.suppress(Unavailable):
                    mesh = await asyncio.to_thread(fetch_json, f"{url}/mesh", self.timing.http_s)
                progress.show(mesh.get("workers", []))
                before, fetched = fetched, _fetched_bytes(mesh)
                if fetched != before:  # A download lasts as long as it brings something.
                    deadline = time.monotonic() + self.settings.start_timeout
                if mesh["ready"]:
                    break
                for pipeline in mesh.get("pipelines", []):
                    if pipeline.get("final"):  # Waiting cannot form it.
                        raise ConfigError(pipeline["reason"])
                if time.monotonic() > deadline:
                    within_s = self.settings.start_timeout
                    raise ConfigError(f"the mesh is not ready after {within_s:.0f} s: {mesh['reason']}")
                await asyncio.sleep(self.timing.watch_s)
        grpc_address = f"{self.settings.host}:{self._gateway.ports['grpc_port']}"
        print(banner(mesh, url, grpc_address, self.started_at, self.settings.api_key is not None), flush=True)

    async def _end(self) -> None:
        """Ends the gateway first, so that requests can finish, then workers and coordinator. Kills all that remain."""
        gateway = [child for child in self.children if child.role == "gateway"]
        rest = [child for child in self.children if child.role != "gateway"]
        for children, timeout_s in ((gateway, self.settings.drain_timeout + 1.0), (rest, self.timing.end_s)):
            for child in children:
                child.signal(signal.SIGTERM)
            await asyncio.gather(*(child.wait(timeout_s) for child in children))
        for child in self.children:
            child.kill()
        self.launcher.stop()
        reap_orphans((), kill=True)


def _fetched_bytes(mesh: dict[str, Any]) -> int:
    """Returns the bytes that workers have fetched of what they fetch from a hub."""
    return sum(int(worker["loaded_bytes"]) for worker in mesh.get("workers", []) if worker["state"] == "fetching")
