"""`stagemesh stage`: starts the ranks, the Stage service and the lease, and ends them in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys

import uvloop

import stagemesh
from stagemesh import process, rpc
from stagemesh.errors import StageLost, StagemeshError
from stagemesh.processes.launcher import Launcher, LaunchTiming
from stagemesh.protos.v1.processes_pb2 import Call
from stagemesh.settings.stage import StageSettings, device_kind

from .agent.files import CheckpointFiles
from .agent.membership import Membership
from .agent.rank_group import RankGroup
from .agent.service import SERVICE_NAME, Agent
from .messages.rank_config import RankConfig
from .timing import StageTiming

log = logging.getLogger(__name__)

RANK = "stagemesh.stage_worker.rank.process:run"
RANK_IMPORTS = "stagemesh.stage_worker.rank.process:preload"
"""Entry points by name: the agent does not import the modules of the ranks."""
MOST_RESTARTS = 5
"""Limit of restarts in a row for a group that dies soon after each start."""


def run(settings: StageSettings, ready_fd: int | None = None) -> int:
    """Runs one worker until SIGTERM or SIGINT. Returns the exit status. Raises ConfigError if it cannot start."""
    role = f"stage {settings.stage}" if settings.stage is not None else "standby"
    process.set_title(role)
    process.set_up_logging(role)
    configs = RankConfig.of_worker(role, settings, device_kind(settings.device))
    launcher = rank_launcher(configs, LaunchTiming().scaled(settings.time_scale))
    # The launcher starts now, while this process has one thread and no descriptors that a fork should not keep.
    imported = RANK.partition(":")[0] in sys.modules
    launcher.begin(fork_here=imported, close=[ready_fd] if ready_fd is not None else [])
    process.prefer()
    timing = StageTiming().scaled(settings.time_scale)
    return uvloop.run(_Worker(settings, configs, launcher, timing).run(ready_fd))


def rank_launcher(configs: list[RankConfig], timing: LaunchTiming) -> Launcher:
    """Makes the launcher of a worker's ranks. On a CUDA device, each rank is a new interpreter.

    A library may initialize CUDA when it is imported, and a fork of such a process cannot use CUDA.
    """
    forks = configs[0].device == "cpu" and sys.platform == "linux"
    imports = Call(function=RANK_IMPORTS, argument=configs[0].pack()) if forks else None
    # torch reads this once, when it is imported.
    env = {"OMP_NUM_THREADS": str(configs[0].compute_threads)}
    return Launcher(configs[0].label, timing, imports=imports, env=env)


def preload(argument: bytes, fds: list[int]) -> int:
    """Imports the modules of workers and their ranks in the process from which workers will be forked.

    `argument`: settings of one such worker, as JSON. Returns an exit status.
    """
    from .rank.process import import_all

    settings = StageSettings.model_validate_json(argument)
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    with contextlib.suppress(StagemeshError):  # The worker itself will report it.
        import_all(RankConfig.of_worker("", settings, "cpu")[0])
    return 0


class _Worker:
    """One worker from start to end. It has one agent. Its rank group may be replaced."""

    def __init__(
        self, settings: StageSettings, configs: list[RankConfig], launcher: Launcher, timing: StageTiming
    ) -> None:
        self.settings = settings
        self.configs = configs
        self.launcher = launcher
        self.timing = timing
        self.worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
        self.stop = asyncio.Event()

    async def run(self, ready_fd: int | None) -> int:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self.stop.set)
        files = CheckpointFiles(self.settings, self.launcher, self.timing)
        agent = Agent(self.settings, self.worker_id, self.timing, files)
        server = await rpc.start_server(
            self.settings.host,
            self.settings.port,
            agent.add_to_server,
            [SERVICE_NAME],
            serving=False,
        )
        address = f"{self.settings.reachable_host}:{server.port}"
        process.tell_ready(ready_fd, port=server.port)
        log.info("worker %s of stagemesh %s listens on %s", self.worker_id, stagemesh.__version__, address)
        membership = Membership(self.settings, agent, self.worker_id, address, self.timing)
        try:
            await self._serve(agent, membership, server)
        finally:
            await membership.stop()
            await server.stop(0.2)
            if agent.ranks is not None:
                await agent.ranks.stop()
            self.launcher.stop()
        return 0

    async def _serve(self, agent: Agent, membership: Membership, server: rpc.Server) -> None:
        """Keeps a rank group running and registered until `stop` is set. Replaces a group that is lost."""
        stopped = asyncio.create_task(self.stop.wait())
        failures = 0
        try:
            while not stopped.done():
                group = RankGroup(self.configs, RANK, agent.on_frame, self.launcher, self.timing)
                agent.ranks = group
                starting = asyncio.create_task(group.start())
                await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    starting.cancel()
                    await asyncio.gather(starting, return_exceptions=True)
                    return
                failure, up_at = starting.exception(), asyncio.get_running_loop().time()
                if failure is not None and not isinstance(failure, StageLost):
                    raise failure
                if failure is None:
                    await server.set_serving(True)
                    membership.register(group, incarnation=secrets.randbits(63))
                    await asyncio.wait((group.lost, stopped), return_when=asyncio.FIRST_COMPLETED)
                    if not group.lost.done():
                        await self._drain(agent, membership)
                        return
                await server.set_serving(False)
                agent.ranks_lost(group.lost.result() if group.lost.done() else str(failure))
                await membership.leave()
                await group.stop()
                failures = 0 if asyncio.get_running_loop().time() - up_at > self.timing.stable_s else failures + 1
                if failures > MOST_RESTARTS:
                    raise StageLost(f"the ranks of {self.worker_id} died {failures} times soon after their start")
                log.error("%s; starting the group again", group.lost.result() if group.lost.done() else failure)
                pause_s = min(self.timing.restart_s * 3 ** (failures - 1), self.timing.restart_most_s)
                await asyncio.wait((stopped,), timeout=pause_s if failures else 0)
        finally:
            stopped.cancel()

    async def _drain(self, agent: Agent, membership: Membership) -> None:
        """Takes no new work, and lets gateways finish their requests within --drain-timeout. Runs on SIGTERM."""
        if not any(stage.active for stage in agent.assigned.values()) or self.settings.drain_timeout == 0:
            return
        log.info("draining for at most %.0f s", self.settings.drain_timeout)
        try:
            await membership.drain()
        except StagemeshError as e:
            log.warning("the drain request failed: %s", e.message)
            return
        clock = asyncio.get_running_loop().time
        asked_at = left_at = clock()
        deadline = asked_at + self.settings.drain_timeout
        # Gateways that moved report it after their sessions end. This worker must not die before that.
        while (now := clock()) < deadline and (
            agent.sessions or (agent.assigned and now < left_at + self.timing.released_s)
        ):
            await asyncio.sleep(self.timing.drain_look_s)
            left_at = now if agent.sessions else left_at
            if now > asked_at + self.timing.drain_again_s:
                asked_at = now
                with contextlib.suppress(StagemeshError):
                    await membership.drain()
