"""`stagemesh stage`: starts the ranks, the Stage service and the lease; ends them in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket

import uvloop

import stagemesh
from stagemesh import process, rpc
from stagemesh.config import StageSettings, device_kind
from stagemesh.errors import StageLost, StagemeshError

from .agent.membership import Membership
from .agent.rank_group import RankGroup
from .agent.rank_starter import RankStarter, Zygote, make_starter
from .agent.service import SERVICE_NAME, Agent, add_to_server
from .messages.rank_config import RankConfig

log = logging.getLogger(__name__)

RESTART_BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
STABLE_S = 5.0
"""A rank group that was up for so long before it died does not count as failing."""
RELEASED_S = 1.0
"""How long the coordinator may take to release a worker whose gateways have left it."""
ASK_AGAIN_S = 1.0
"""Between two asks for a drain: one that was started again without its state has forgotten the first."""

_imported = False
"""Whether this process has imported what ranks need, before it became a worker."""


def run(settings: StageSettings, ready_fd: int | None = None) -> int:
    """Runs one worker until SIGTERM or SIGINT; returns the exit status. Raises ConfigError when it cannot start."""
    role = _role(settings)
    process.set_title(role)
    process.set_up_logging(role)
    device = device_kind(settings.device)
    starter = make_starter(device)
    if _imported and isinstance(starter, Zygote):
        # Now, while one thread runs and nothing is open that is not the ranks'.
        starter.fork(RankConfig.of_worker(role, settings, device), ready_fd)
    process.prefer()
    return uvloop.run(_Worker(settings, role, device, starter).run(ready_fd))


def preload(settings: StageSettings) -> None:
    """Imports what the ranks of such a worker need, in a process that is to be forked into workers. On CUDA devices
    nothing: there each rank imports for itself."""
    global _imported
    device = device_kind(settings.device)
    if device == "cpu":
        if settings.threads:
            os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # Read once, when torch is imported.
        from .rank.process import import_all

        import_all(RankConfig.of_worker(_role(settings), settings, device))
        _imported = True


def _role(settings: StageSettings) -> str:
    return f"stage {settings.stage}" if settings.stage is not None else "standby"


class _Worker:
    """One worker from start to end: its agent stays while rank groups come and go."""

    def __init__(self, settings: StageSettings, role: str, device: str, starter: RankStarter) -> None:
        self.settings = settings
        self.role = role
        self.device = device
        self.starter = starter
        self.worker_id = settings.worker_id or f"{socket.gethostname()}-{os.getpid()}"
        self.stop = asyncio.Event()

    async def run(self, ready_fd: int | None) -> int:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self.stop.set)
        agent = Agent(self.settings, self.worker_id)
        server = await rpc.start_server(
            self.settings.host,
            self.settings.port,
            lambda s: add_to_server(agent, s),
            [SERVICE_NAME],
            serving=False,
        )
        address = f"{self.settings.reachable_host}:{server.port}"
        process.tell_ready(ready_fd, port=server.port)
        log.info("worker %s of stagemesh %s listens on %s", self.worker_id, stagemesh.__version__, address)
        membership = Membership(self.settings, agent, self.worker_id, address)
        try:
            await self._serve(agent, membership, server)
        finally:
            await membership.stop()
            await server.stop(0.2)
            if agent.ranks is not None:
                await agent.ranks.stop()
            self.starter.stop()
        return 0

    async def _serve(self, agent: Agent, membership: Membership, server: rpc.Server) -> None:
        """Keeps a rank group alive and registered until told to stop; a lost group is made anew."""
        stopped = asyncio.create_task(self.stop.wait())
        failures = 0
        try:
            while not stopped.done():
                group = RankGroup(self.settings, self.device, self.role, agent.on_frame, self.starter)
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
                failures = 0 if asyncio.get_running_loop().time() - up_at > STABLE_S else failures + 1
                if failures > len(RESTART_BACKOFF_S):
                    raise StageLost(
                        f"the ranks of {self.worker_id} died {failures} times within a minute of their start"
                    )
                log.error("%s; starting the group anew", group.lost.result() if group.lost.done() else failure)
                with contextlib.suppress(TimeoutError):
                    backoff_s = RESTART_BACKOFF_S[failures - 1] if failures else 0
                    await asyncio.wait_for(asyncio.shield(stopped), backoff_s)
        finally:
            stopped.cancel()

    async def _drain(self, agent: Agent, membership: Membership) -> None:
        """SIGTERM: takes nothing new and lets gateways finish what they hold, within --drain-timeout."""
        if not any(stage.active for stage in agent.assigned.values()) or self.settings.drain_timeout == 0:
            return
        log.info("draining for at most %.0f s", self.settings.drain_timeout)
        try:
            await membership.drain()
        except StagemeshError as e:
            log.warning("the coordinator cannot be told of the drain: %s", e.message)
            return
        clock = asyncio.get_running_loop().time
        asked_at = left_at = clock()
        deadline = asked_at + self.settings.drain_timeout
        # Gateways that have gone over say so behind their sessions' ends: to die before they are heard would undo it.
        while (now := clock()) < deadline and (agent.sessions or (agent.assigned and now < left_at + RELEASED_S)):
            await asyncio.sleep(0.05)
            left_at = now if agent.sessions else left_at
            if now > asked_at + ASK_AGAIN_S:
                asked_at = now
                with contextlib.suppress(StagemeshError):
                    await membership.drain()
