"""Child processes of `serve`: started, watched, restarted when they die, and always reaped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from stagemesh.errors import ConfigError
from stagemesh.forked import ForkedChild
from stagemesh.settings.base import Base

from .forking import ForkServer

log = logging.getLogger(__name__)

PORTS_TIMEOUT_S = 60.0
BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
STABLE_S = 5.0
"""A process that was up for so long before it died is started again at once."""
POLL_S = 0.02
KEPT = ("STAGEMESH_LOG_LEVEL", "STAGEMESH_FAULT_DIR")
SECRETS = ("api_key",)
"""Passed by environment: a command line can be read by everybody on the machine."""


@dataclass
class Child:
    """One service process and how to start it again."""

    role: str
    """Command of the `stagemesh` CLI: coordinator, stage or gateway."""
    label: str
    settings: Base
    env: dict[str, str] = field(default_factory=dict)
    forkserver: ForkServer | None = None
    """Has imported what it needs; None: it is a new interpreter."""
    process: subprocess.Popen[bytes] | ForkedChild | None = None
    ports: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    """Deaths in a row, each soon after the start."""
    started_at: float = 0.0

    async def start(self) -> None:
        """Starts the process and waits for the ports it got. Raises ConfigError when it ends before it listens."""
        read_fd, write_fd = os.pipe()
        try:
            forked = await self.forkserver.fork(self.command, write_fd) if self.forkserver is not None else None
            self.process = forked or self._spawn(write_fd)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self.started_at = time.monotonic()
        said = await _read_line(read_fd, PORTS_TIMEOUT_S)
        if not said:
            code = await self.wait(5.0)
            raise ConfigError(f"the {self.label} did not start (exit status {code}); its message is above")
        self.ports = {key: int(value) for key, value in json.loads(said).items()}

    @property
    def command(self) -> list[str]:
        """What it runs, as it would be typed behind `stagemesh`."""
        return [self.role, *flags(self.settings)]

    def _spawn(self, write_fd: int) -> subprocess.Popen[bytes]:
        secrets = {f"STAGEMESH_{name.upper()}": str(v) for name in SECRETS if (v := getattr(self.settings, name, None))}
        started = ["--ready-fd", str(write_fd), "--parent-pid", str(os.getpid())]
        # A group of its own: Ctrl-C reaches the supervisor alone, which ends its children in the right order. Not a
        # session of its own: between sessions Linux shares cores alike, whatever the nice values in them
        # (sched_autogroup), and a standby that loads its weights would take half of a serving stage's core.
        return subprocess.Popen(
            [sys.executable, "-m", "stagemesh.cli.main", *self.command, *started],
            pass_fds=[write_fd],
            stdin=subprocess.DEVNULL,
            process_group=0,
            env=environment() | self.env | secrets,
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs; reaps it when it has ended."""
        return self.process is not None and self.process.poll() is None

    def pin_ports(self) -> None:
        """Keeps the ports it got for every later start: others have been told of them."""
        known = {key: value for key, value in self.ports.items() if key in type(self.settings).model_fields}
        self.settings = self.settings.model_copy(update=known)

    async def restart(self) -> None:
        """Starts it again after it died, later each time that it does not stay up."""
        assert self.process is not None
        how = _how(self.process.returncode)
        self.restarts = 0 if time.monotonic() - self.started_at > STABLE_S else self.restarts + 1
        delay_s = BACKOFF_S[min(self.restarts, len(BACKOFF_S) - 1)]
        log.warning("the %s %s; starting it again%s", self.label, how, f" in {delay_s} s" if delay_s else "")
        await asyncio.sleep(delay_s)
        with contextlib.suppress(ConfigError):  # Its own message is on stderr, and the watch loop sees it dead.
            await self.start()

    def signal(self, sig: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.alive and self.process is not None:
            self.process.send_signal(sig)

    async def wait(self, timeout_s: float) -> int | None:
        """Waits for its end; the exit status, or None when it still runs."""
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        return self.process.poll() if self.process is not None else None

    def kill(self) -> None:
        """Ends it for certain, with whatever it started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment() -> dict[str, str]:
    """For children. `serve` has read its own variables; a child that read them too would take another's port for its
    own."""
    return {k: v for k, v in os.environ.items() if not k.startswith("STAGEMESH_") or k in KEPT}


def flags(settings: Base) -> list[str]:
    """Settings as flags, those that differ from the defaults: what `ps` shows can be typed again."""
    out: list[str] = []
    for name in type(settings).model_fields:
        value: Any = getattr(settings, name)
        if value == type(settings).model_fields[name].default or name in SECRETS:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            out.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            out.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return out


def _how(code: int | None) -> str:
    return (
        f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with status {code}"
    )


async def _read_line(fd: int, timeout_s: float) -> bytes:
    """One line from a pipe; what came when the writer went away or the time was up."""
    loop = asyncio.get_running_loop()
    with os.fdopen(fd, "rb") as pipe:
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            return await asyncio.wait_for(reader.readline(), timeout_s)
        except TimeoutError:
            return b""
        finally:
            transport.close()
