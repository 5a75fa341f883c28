"""Child processes of `serve`: started, watched, restarted when they die, and always reaped."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from dataclasses import dataclass, field

from stagemesh.errors import ConfigError, Unavailable
from stagemesh.processes.child import ChildProcess, how_it_ended
from stagemesh.processes.cpu import Patience, answered
from stagemesh.processes.launcher import Launcher
from stagemesh.processes.messages import MAX_MESSAGE_BYTES, Kind, unpack
from stagemesh.protos.v1 import processes_pb2
from stagemesh.settings.base import Base

from .timing import ServeTiming

log = logging.getLogger(__name__)

SERVICE = "stagemesh.cli.service:run"
RESTART_GROWTH = 2.5


@dataclass
class Child:
    """One service process, with the data to start it again."""

    role: str
    """Command of the `stagemesh` CLI: coordinator, stage or gateway."""
    label: str
    settings: Base
    launcher: Launcher
    timing: ServeTiming
    forked: bool = False
    """Whether it is forked from the launcher's forkserver."""
    process: ChildProcess | None = None
    ports: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    """Number of times in a row that it died soon after its start."""
    started_at: float = 0.0

    async def start(self) -> None:
        """Starts the process and waits for its ports. Raises ConfigError if it ends before it listens."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.setblocking(False)
            with theirs:
                self.process = await self._launch(theirs.fileno())
            self.started_at = time.monotonic()
            total_s, look_s = self.timing.listen_s, self.timing.watch_s
            patience = Patience(self.process.pid, total_s=total_s, idle_s=total_s, look_s=look_s)
            try:
                said = await answered(asyncio.get_running_loop().sock_recv(ours, MAX_MESSAGE_BYTES), patience)
            except TimeoutError:
                raise ConfigError(f"the {self.label} does not listen after {total_s:.0f} s") from None
        if not said:
            code = await self.wait(self.timing.end_s)
            raise ConfigError(f"the {self.label} did not start (exit status {code}); its message is above")
        self.ports = dict(unpack(Kind.LISTENING, processes_pb2.Listening, said).ports)
        # Other services know these ports, so every later start uses the same ones.
        known = {key: port for key, port in self.ports.items() if key in type(self.settings).model_fields}
        self.settings = self.settings.model_copy(update=known)

    async def _launch(self, ready_fd: int) -> ChildProcess:
        settings = self.settings.model_dump_json()
        start = processes_pb2.ServiceStart(command=self.role, settings=settings).SerializeToString()
        if self.forked:
            try:
                return await self.launcher.start(SERVICE, start, [ready_fd])
            except (Unavailable, ConfigError) as e:
                log.warning("%s; the %s is started without it", e.message, self.label)
        return self.launcher.spawn(SERVICE, start, [ready_fd])

    @property
    def alive(self) -> bool:
        """Whether the process runs. Reaps it if it has ended."""
        return self.process is not None and self.process.poll() is None

    async def restart(self) -> None:
        """Starts it, or starts it again after it died. The pause grows if it dies soon after each start."""
        if self.process is not None:
            how, timing = how_it_ended(self.process.returncode), self.timing
            self.restarts = 0 if time.monotonic() - self.started_at > timing.stable_s else self.restarts + 1
            delay_s = min(timing.restart_s * RESTART_GROWTH ** (self.restarts - 1), timing.restart_most_s)
            delay_s = delay_s if self.restarts else 0.0
            log.warning("the %s %s; starting it again%s", self.label, how, f" in {delay_s:.1f} s" if delay_s else "")
            await asyncio.sleep(delay_s)
        try:
            await self.start()
        except ConfigError as e:  # The watch loop notices that it is dead.
            log.warning("%s", e.message)

    def signal(self, sig: signal.Signals) -> None:
        """Sends a signal if it still runs."""
        if self.process is not None:
            self.process.send_signal(sig)

    async def wait(self, timeout_s: float) -> int | None:
        """Waits for its end. Returns the exit status, or None if it still runs."""
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(self.timing.end_look_s)
        return self.process.poll() if self.process is not None else None

    def kill(self) -> None:
        """Kills it and all processes that it started."""
        if self.process is not None:
            self.process.kill_group()
            self.process.wait(self.timing.end_s)
