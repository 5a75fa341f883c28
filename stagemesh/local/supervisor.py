"""`stagemesh serve`: a whole mesh on this machine, as processes that talk as they would on separate machines.

The supervisor starts a coordinator, one worker a stage and a gateway, shows their progress, restarts what dies, and
ends them all when it is told to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from stagemesh import process
from stagemesh.errors import ConfigError
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.processes.orphans import adopt_orphans, reap_orphans
from stagemesh.protos.v1.processes_pb2 import Call
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.stage import StageSettings, device_kind

from .children import Child
from .plan import LOOPBACK, coordinator_settings, gateway_settings, standby_settings, worker_settings
from .progress import Progress, banner
from .timing import ServeTiming

log = logging.getLogger(__name__)

WORKER_IMPORTS = "stagemesh.stage_worker.main:preload"


def run(settings: ServeSettings) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit status. Raises ConfigError when the mesh cannot be built."""
    process.set_title("serve")
    adopt_orphans()
    # Inherited by all: they are in this session, but not in the terminal's foreground, where `stty tostop` stops who
    # writes.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    process.set_up_logging("serve")
    return asyncio.run(_Supervisor(settings).run())


class _Supervisor:
    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.children: list[Child] = []
        self._gateway: Child
        self._coordinator = ""
        self.stop = asyncio.Event()
        self.started_at = time.monotonic()
        self.timing = ServeTiming().scaled(settings.time_scale)
        # On a terminal, bars and the banner tell the story; elsewhere the services' own log lines do.
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
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self.stop.set)
        with tempfile.TemporaryDirectory(prefix="stagemesh-serve-") as state_dir:
            try:
                if not await self._started(state_dir):
                    return 0
                watching = [asyncio.create_task(self._watch(list(self.children)))]
                try:
                    await self._until_ready(watching[0])
                    if not self.stop.is_set():
                        watching += [asyncio.create_task(self._bring_up(child)) for child in self._standbys()]
                    stopped = asyncio.create_task(self.stop.wait())
                    done, _ = await asyncio.wait([*watching, stopped], return_when=asyncio.FIRST_COMPLETED)
                    if not self.stop.is_set():
                        done.pop().result()
                finally:
                    for task in watching:
                        task.cancel()
                    await asyncio.gather(*watching, return_exceptions=True)
            finally:
                await self._end()
        return 0

    async def _started(self, state_dir: str) -> bool:
        """Starts everything; False when told to stop before that is done."""
        starting, stopped = asyncio.create_task(self._start(state_dir)), asyncio.create_task(self.stop.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return False
        stopped.cancel()
        starting.result()
        return True

    async def _start(self, state_dir: str) -> None:
        coordinator = self._child("coordinator", "coordinator", coordinator_settings(self.settings, state_dir))
        # Beside the coordinator: it imports longer than any other process.
        self.launcher.begin()
        await coordinator.start()
        coordinator.pin_ports()
        address = f"{LOOPBACK}:{coordinator.ports['port']}"
        self._coordinator = address
        workers = [self._worker(settings) for settings in worker_settings(self.settings, address)]
        self._gateway = self._child("gateway", "gateway", gateway_settings(self.settings, address))
        # Whatever imports something does so beside the others.
        await self._start_all([*workers, self._gateway])

    def _standbys(self) -> list[Child]:
        """For when everything serves: before, they would take the place of a stage that registers a moment later."""
        return [self._worker(settings) for settings in standby_settings(self.settings, self._coordinator)]

    async def _bring_up(self, child: Child) -> None:
        """Starts a child without which everything goes on, and keeps it."""
        try:
            await self._start_all([child])
        except ConfigError as e:
            log.warning("%s", e.message)
        await self._keep(child)

    def _worker(self, settings: StageSettings) -> Child:
        return self._child("stage", f"worker {settings.worker_id}", settings, forked=self._forks)

    @staticmethod
    async def _start_all(children: Sequence[Child]) -> None:
        await asyncio.gather(*(child.start() for child in children))
        for child in children:
            child.pin_ports()

    def _child(self, role: str, label: str, settings: Any, *, forked: bool = False) -> Child:
        child = Child(role, label, settings, self.launcher, self.timing, forked)
        self.children.append(child)
        return child

    async def _watch(self, children: Sequence[Child]) -> None:
        """Restarts what dies, each child on its own."""
        await asyncio.gather(*(self._keep(child) for child in children), self._reap())

    async def _reap(self) -> None:
        """The ranks of an agent that was killed come to this process when they die."""
        while not self.stop.is_set():
            self.launcher.reap()
            await asyncio.sleep(self.timing.watch_s)

    async def _keep(self, child: Child) -> None:
        while not self.stop.is_set():
            if not child.alive:
                await child.restart()
            await asyncio.sleep(self.timing.watch_s)

    # -- readiness --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the gateway can be reached from this machine."""
        host = self.settings.host if self.settings.host not in ("0.0.0.0", "::") else LOOPBACK
        return f"http://{host}:{self._gateway.ports['port']}"

    async def _until_ready(self, watching: asyncio.Task[None]) -> None:
        progress = Progress()
        deadline = time.monotonic() + self.settings.start_timeout
        mesh: dict[str, Any] = {}
        try:
            while not self.stop.is_set():
                if watching.done():
                    watching.result()
                answer = await asyncio.to_thread(_get_json, f"{self.url}/mesh", self.timing.http_s)
                if answer is not None:
                    mesh = answer
                    progress.show(mesh.get("workers", []))
                    if mesh["ready"]:
                        break
                    self._raise_if_hopeless(mesh)
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"the mesh is not ready after {self.settings.start_timeout:.0f} s: "
                        f"{mesh.get('reason', 'the gateway does not answer')}"
                    )
                await asyncio.sleep(self.timing.watch_s)
        finally:
            progress.close()
        if not self.stop.is_set():
            grpc_address = f"{self.settings.host}:{self._gateway.ports['grpc_port']}"
            text = banner(mesh, self.url, grpc_address, self.started_at, self.settings.api_key is not None)
            print(text, flush=True)

    @staticmethod
    def _raise_if_hopeless(mesh: dict[str, Any]) -> None:
        """A mesh that no waiting can form: say why and end, rather than look as if it were loading."""
        for pipeline in mesh.get("pipelines", []):
            if pipeline.get("final"):
                raise ConfigError(pipeline["reason"])

    # -- the end ----------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Gateway first, so that requests can finish; then workers and coordinator; then whatever is left, hard."""
        self.stop.set()
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


def _get_json(url: str, timeout_s: float) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except (OSError, ValueError):
        return None
