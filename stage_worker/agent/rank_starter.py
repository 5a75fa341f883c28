"""How an agent starts its ranks: forked from a process that has imported what they need, or each from nothing.

Importing torch and UCX takes seconds of a core, which a rank that is started again would take from those that refill
its successor, and for which its requests would wait where there is none. So a worker keeps a zygote (the word is
Android's and Chrome's; zygote.py), from which a rank is there in milliseconds. It is a fork of the agent where that
has itself been forked from a process that had imported all that (as `serve` does), else a new interpreter. On CUDA
devices each rank is a new process: a library may have initialised CUDA when it was imported, and a fork of that is of
no use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Protocol

from stagemesh import process
from stagemesh.errors import ConfigError, StageLost, StagemeshError
from stagemesh.forked import ForkedChild

from ..messages.rank_config import RankConfig

FIRST_S, NEXT_S = 120.0, 5.0
"""What a zygote may take for its first rank, imports included, and for each further one."""
ENDED_S = 10.0
"""How long a rank that was killed may take to end."""
TOLD_S = 1.0
"""How long after a rank's end its zygote may take to tell how it ended."""
MAX_MESSAGE = 1 << 12


class RankProcess(Protocol):
    """What `subprocess.Popen` and `ForkedRank` have in common."""

    @property
    def pid(self) -> int:
        """Of the process."""

    def poll(self) -> int | None:
        """The exit status, as `subprocess` has it; None while it runs."""

    def kill(self) -> None:
        """Ends it."""

    def wait(self) -> int:
        """Waits for the end of one that was killed; the exit status."""


class RankStarter(Protocol):
    """Starts ranks until `stop`."""

    async def start(self, config: RankConfig) -> RankProcess:
        """Starts a rank, which inherits the configuration's descriptors.

        Raises ConfigError where it would fail again, StageLost where another try may do.
        """

    def stop(self) -> None:
        """Starts none any more. Those that run are ended by whoever started them, before."""


def make_starter(device: str) -> RankStarter:
    """For ranks on this kind of device."""
    return Spawner() if device == "cuda" else Zygote()


class Spawner:
    """Each rank is a new interpreter."""

    async def start(self, config: RankConfig) -> RankProcess:
        """See `RankStarter`."""
        return _spawn("rank.process", config, config.fds)

    def stop(self) -> None:
        """See `RankStarter`."""


class ForkedRank:
    """A rank whose parent is the zygote: seen by a pidfd, its end told by its parent."""

    def __init__(self, zygote: Zygote, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        self._pidfd = pidfd

    def poll(self) -> int | None:
        """See `RankProcess`."""
        if self.returncode is None and _readable(self._pidfd, 0.0):
            self._zygote.take_messages()
        return self.returncode

    def kill(self) -> None:
        """See `RankProcess`."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """See `RankProcess`."""
        if self.returncode is None:
            _readable(self._pidfd, ENDED_S)
            self._zygote.wait_told(self)
        # Where nobody tells it any more, the zygote has ended, and its ranks were killed with it.
        self.ended(-signal.SIGKILL)
        assert self.returncode is not None
        return self.returncode

    def ended(self, code: int) -> None:
        """It is known how."""
        if self.returncode is None:
            self.returncode = code
            os.close(self._pidfd)


class Zygote:
    """The agent's side of its zygote: started with the first rank, and anew when it is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | ForkedChild | None = None
        self._socket: socket.socket | None = None
        self._ranks: dict[int, ForkedRank] = {}
        self._forked: list[ForkedRank] = []
        """Those that `start` has not handed out yet."""
        self._status = 0
        """With which the last one has ended."""
        self._stopping = False
        self._within_s = FIRST_S

    async def start(self, config: RankConfig) -> RankProcess:
        """See `RankStarter`."""
        self.take_messages()
        if self._socket is None:
            self._begin(config)
        assert self._socket is not None
        with contextlib.suppress(ConnectionError):
            socket.send_fds(self._socket, [config.to_json().encode()], config.fds)
        try:
            async with asyncio.timeout(self._within_s):
                while not self._forked:
                    await _until_readable(self._socket)
                    self.take_messages()
                    if self._socket is None:
                        raise self._why_none(config.label)
        except TimeoutError as e:
            self._end()
            raise StageLost(f"the zygote of {config.label} forked no rank within {self._within_s:g} s") from e
        self._within_s = NEXT_S
        return self._forked.pop()

    def _why_none(self, label: str) -> StagemeshError:
        """It has ended; by a signal, another one may do."""
        if self._status < 0:
            return StageLost(f"the zygote of {label} was killed by {signal.Signals(-self._status).name}")
        return ConfigError(f"no rank of {label} can be started: see what was said above")

    def fork(self, config: RankConfig, unwanted: int | None = None) -> None:
        """Makes the zygote a fork of this process, which has imported what ranks need and runs one thread. It closes
        the descriptor `unwanted`."""
        with self._new_socket() as theirs:
            pid = os.fork()
            if pid == 0:
                assert self._socket is not None
                self._socket.close()
                if unwanted is not None:
                    os.close(unwanted)
                from ..rank.zygote import run

                forked = replace(config, control_fd=theirs.detach())
                process.run_and_exit(lambda: run(forked), "this zygote ends, and with it its ranks")
            self._process = ForkedChild(pid)

    def _begin(self, config: RankConfig) -> None:
        with self._new_socket() as theirs:
            self._process = _spawn("rank.zygote", replace(config, control_fd=theirs.fileno()), [theirs.fileno()])

    def _new_socket(self) -> socket.socket:
        self._within_s = FIRST_S
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        return theirs

    def take_messages(self) -> None:
        """What the zygote has told; what follows from its end when that has come."""
        while self._socket is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._end()
                return
            said = json.loads(data)
            if fds:
                rank = self._ranks[said["pid"]] = ForkedRank(self, said["pid"], fds[0])
                self._forked.append(rank)
            else:
                self._ranks.pop(said["pid"]).ended(said["status"])

    def wait_told(self, rank: ForkedRank) -> None:
        """Until the end of a rank is told, or nobody will."""
        while rank.returncode is None and self._socket is not None and _readable(self._socket.fileno(), TOLD_S):
            self.take_messages()

    def _end(self) -> None:
        """The zygote is gone, and its ranks with it: the kernel kills them."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        for rank in self._ranks.values():
            rank.ended(-signal.SIGKILL)
        self._ranks.clear()
        self._forked.clear()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It has closed its end, and is about to end by itself with a status that says why.
                self._process.wait(0 if self._stopping else TOLD_S)
            self._process.kill()
            self._status = self._process.wait(ENDED_S)
        self._process = None

    def stop(self) -> None:
        """See `RankStarter`."""
        self._stopping = True
        self._end()


def _spawn(module: str, config: RankConfig, fds: list[int]) -> subprocess.Popen[bytes]:
    env = dict(os.environ)
    if config.threads:
        env["OMP_NUM_THREADS"] = str(config.threads)
    started = subprocess.Popen(
        [sys.executable, "-m", f"stagemesh.stage_worker.{module}", config.to_json()],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=env,
    )
    process.not_prefer(started.pid)
    return started


def _readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


async def _until_readable(sock: socket.socket) -> None:
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    fd = sock.fileno()
    loop.add_reader(fd, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(fd)  # Also of a socket that `stop` has closed meanwhile.
