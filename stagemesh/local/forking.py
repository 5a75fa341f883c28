"""How `serve` has its workers forked by a forkserver (stagemesh/cli/forkserver.py), as long as that is there."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from stagemesh.forked import ForkedChild

log = logging.getLogger(__name__)

FIRST_S, NEXT_S = 60.0, 5.0
"""What it may take for the first worker, its imports included, and for each other one."""
MAX_MESSAGE = 1 << 12


class ForkServer:
    """The supervisor's side of it."""

    def __init__(self, worker: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts it. `worker`: command and flags of a worker like those that it is to fork; `env`: of them all."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        self._one_at_a_time = asyncio.Lock()
        self._within_s = FIRST_S
        module = [sys.executable, "-m", "stagemesh.cli.forkserver"]
        with theirs:
            self.process = subprocess.Popen(
                [*module, str(theirs.fileno()), str(os.getpid()), *worker],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env=dict(env),
            )

    @property
    def forks(self) -> bool:
        """Whether there may be a child of this process that nobody knows of yet."""
        return self._one_at_a_time.locked()

    async def fork(self, argv: Sequence[str], ready_fd: int) -> ForkedChild | None:
        """A child of this process that runs this command and tells its ports to `ready_fd`; None where there is no
        forkserver any more."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(self._within_s):
                    socket.send_fds(self._socket, [json.dumps(list(argv)).encode()], [ready_fd])
                    said = await asyncio.get_running_loop().sock_recv(self._socket, MAX_MESSAGE)
            except (OSError, TimeoutError):
                said = b""
            except asyncio.CancelledError:
                self.end()  # What it tells now would be taken for the answer to another question.
                raise
            if said:
                self._within_s = NEXT_S
                return ForkedChild(json.loads(said)["pid"])
            if self._socket.fileno() >= 0:
                self.end()
                log.warning("the forkserver is gone; workers are started without it")
            return None

    def end(self) -> None:
        """Ends it. What it has forked goes on."""
        self._socket.close()
        self.process.kill()
        self.process.wait()
