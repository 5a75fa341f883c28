"""Starts child processes: as new interpreters, or as forks of a process that has imported their modules.

To import torch and UCX takes seconds of a core for each child, and a restarted child takes them from processes that
serve. With `imports`, a launcher keeps a forkserver (forkserver.py) that has imported the modules once, and starts a
child in milliseconds. In both cases the child belongs to this process, which reaps it. The kernel ends the child when
this process ends. docs/adr/0015 gives the reason for each rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from stagemesh import process
from stagemesh.errors import ConfigError, InternalError, Unavailable
from stagemesh.protos.v1.processes_pb2 import Call, Forked
from stagemesh.timing import Timing

from . import forkserver
from .child import ChildProcess, how_it_ended
from .cpu import Patience, answered
from .messages import MAX_MESSAGE_BYTES, Kind, send_call, unpack
from .orphans import adopt_orphans, reap_orphans

log = logging.getLogger(__name__)

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps children, and their own children, from importing modules from the current folder."""


@dataclass(frozen=True)
class LaunchTiming(Timing):
    """Times of starting children. Time in which a child had no core does not count."""

    import_s: float = 120.0
    """Time within which a child must have imported its modules, and answer."""
    idle_s: float = 5.0
    """Time after which a forkserver that does nothing is given up: it neither runs nor waits for a core or a disk."""
    end_s: float = 1.0
    """Longest wait for the end of a forkserver that was killed, or that closed its socket."""
    look_s: float = 0.1
    """Interval of checks of a child while waiting for it."""

    def relations(self) -> Iterator[tuple[bool, str]]:
        """Yields the relations between these times; see `Timing`."""
        yield self.look_s < self.idle_s < self.import_s, "look_s < idle_s < import_s"


@dataclass
class _ForkServer:
    """A child that forks children for this process."""

    child: ChildProcess
    socket: socket.socket

    def end(self, timeout_s: float) -> None:
        """Kills the forkserver, and children that it forked for abandoned calls."""
        self.child.kill()
        self.child.wait(timeout_s)
        with self.socket, contextlib.suppress(OSError, InternalError):
            while data := self.socket.recv(MAX_MESSAGE_BYTES):
                unwanted = ChildProcess(unpack(Kind.FORKED, Forked, data).pid)
                unwanted.kill()
                unwanted.wait(timeout_s)


class Launcher:
    """Starts children of this process. The caller of `start` ends each child and waits for it."""

    def __init__(
        self,
        label: str,
        timing: LaunchTiming,
        *,
        imports: Call | None = None,
        own_groups: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Create it before `process.prefer`: children get the nice value that this process has now.

        Args:
            label: role of this process, for titles and messages.
            imports: a call that imports the children's modules. A forkserver runs it once. None: children are spawned.
            own_groups: each child leads a process group, so that Ctrl-C only reaches this process.
            env: environment variables of children, added to those of this process.
        """
        self._title = f"{label} forkserver".strip()
        self._timing = timing
        self._imports = imports
        self._own_groups = own_groups
        self._env = dict(env or {})
        self._nice = os.getpriority(os.PRIO_PROCESS, 0)
        self._server: _ForkServer | None = None
        self._has_forked = False
        """Whether a forkserver has ever forked a child. If so, a killed one is started again at once."""
        self._one_at_a_time = asyncio.Lock()
        self._children: list[ChildProcess] = []

    @property
    def forkserver(self) -> ChildProcess | None:
        """The current forkserver, if there is one."""
        return self._server.child if self._server is not None else None

    async def start(self, function: str, argument: bytes, fds: Sequence[int]) -> ChildProcess:
        """Starts a child that runs `function(argument, fds)`, where `function` is "package.module:name".

        With `imports` it is forked, otherwise spawned. It ends with the status that the function returns.

        Raises:
            Unavailable: the forkserver was killed, or hangs. The next call starts another one.
            ConfigError: the forkserver ended by itself. Another one would, too.
        """
        if self._imports is None:
            return self.spawn(function, argument, fds)
        async with self._one_at_a_time:
            server = self._server or self._begin(fork_here=False)
            try:
                send_call(server.socket, Kind.FORK, self._call(function, argument), fds)
                answer = asyncio.get_running_loop().sock_recv(server.socket, MAX_MESSAGE_BYTES)
                timing = self._timing
                patience = Patience(
                    server.child.pid, total_s=timing.import_s, idle_s=timing.idle_s, look_s=timing.look_s
                )
                said = await answered(answer, patience)
            except TimeoutError:
                self._end_server()
                raise Unavailable(f"the {self._title} forked no child, and does not go on") from None
            except OSError:
                said = b""
            except BaseException:
                self._end_server()  # Its late answer would be taken for the answer to the next call.
                raise
            if not said:
                self._raise_why_it_ended(server)
            self._has_forked = True
            return self._own(ChildProcess(unpack(Kind.FORKED, Forked, said).pid))

    def spawn(self, function: str, argument: bytes, fds: Sequence[int]) -> ChildProcess:
        """Starts such a child as a new interpreter. See `start`."""
        child, sock = self._new_interpreter()
        with sock:
            send_call(sock, Kind.RUN, self._call(function, argument), fds)
        return child

    def begin(self, *, fork_here: bool = False, close: Sequence[int] = ()) -> None:
        """Starts the forkserver before the first child needs it. Does nothing without `imports`.

        Args:
            fork_here: fork this process instead of starting an interpreter. This process must have imported the
                children's modules, and must have one thread.
            close: descriptors that such a fork closes.
        """
        if self._imports is not None:
            self._begin(fork_here=fork_here, close=close)

    def reap(self) -> None:
        """Reaps orphans, and replaces a dead forkserver if one ever forked a child. Call it periodically."""
        if self._one_at_a_time.locked():
            return  # A child may have been forked that is not in `_children` yet.
        self._children = [child for child in self._children if child.poll() is None]
        server = self._server
        if server is not None and server.child.poll() is not None:
            log.warning("the %s is gone: it %s", self._title, how_it_ended(server.child.returncode))
            self._end_server()
            if self._has_forked:
                self._begin(fork_here=False)
        reap_orphans({child.pid for child in [*self._children, self.forkserver] if child is not None})

    def stop(self) -> None:
        """Ends the forkserver. The children must have ended before."""
        self._end_server()

    # -- the forkserver ---------------------------------------------------------------------------------------------

    def _begin(self, *, fork_here: bool, close: Sequence[int] = ()) -> _ForkServer:
        assert self._imports is not None
        adopt_orphans()
        child, sock = self._fork_here(close) if fork_here else self._new_interpreter()
        sock.setblocking(False)
        self._server = _ForkServer(child, sock)
        send_call(sock, Kind.IMPORT, self._imports)
        return self._server

    def _fork_here(self, close: Sequence[int]) -> tuple[ChildProcess, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for fd in close:
                os.close(fd)
            process.run_and_exit(lambda: forkserver.run(theirs, parent_pid, self._title))
        theirs.close()
        return ChildProcess(pid), ours

    def _end_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end(self._timing.end_s)

    def _raise_why_it_ended(self, server: _ForkServer) -> NoReturn:
        status = server.child.wait(self._timing.end_s)
        self._end_server()
        if status is None or status < 0:
            raise Unavailable(f"the {self._title} {how_it_ended(status) if status else 'closed its socket'}")
        raise ConfigError(f"the {self._title} can fork nothing: see what was said above")

    # -- new interpreters -------------------------------------------------------------------------------------------

    def _new_interpreter(self) -> tuple[ChildProcess, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            started = subprocess.Popen(
                [sys.executable, "-m", forkserver.__name__, str(theirs.fileno()), str(os.getpid()), self._title],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # This is not a new session: Linux gives each session the same share of a core, whatever its nice values
                # (sched_autogroup). A standby that loads would take half of the core of a stage that serves.
                process_group=0 if self._own_groups else None,
                env=os.environ | self._env | SAFE_PATH,
            )
        started.returncode = 0  # `ChildProcess` waits for it; Popen must not.
        if os.getpriority(os.PRIO_PROCESS, 0) != self._nice:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, started.pid, self._nice)
        return self._own(ChildProcess(started.pid)), ours

    def _call(self, function: str, argument: bytes) -> Call:
        return Call(function=function, argument=argument, own_group=self._own_groups)

    def _own(self, child: ChildProcess) -> ChildProcess:
        self._children.append(child)
        return child
