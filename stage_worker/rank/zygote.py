"""A worker's zygote: the agent's child and its ranks' parent, a fork of the agent or, where that has not imported what
ranks need, `python -m stagemesh.stage_worker.rank.zygote CONFIG`.

It imports what a rank needs, computes nothing, starts no thread, and forks a rank for each configuration that comes on
its socket, with the descriptors that the rank is to have. It reaps its ranks and tells their ends. When the agent is
gone the kernel kills it, and then them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from dataclasses import replace
from typing import NoReturn

from stagemesh import process
from stagemesh.errors import TransportError
from stagemesh.transport.ucx.worker import load_ucxx

from ..messages.rank_config import RankConfig
from . import process as rank

MAX_MESSAGE, MAX_FDS = 1 << 16, 253
"""Of one datagram; the kernel takes no more descriptors in one."""


def main(argv: list[str]) -> int:
    """A zygote that is a new interpreter."""
    return run(RankConfig.from_json(argv[1]))


def run(config: RankConfig) -> int:
    """Forks ranks until the agent is gone."""
    process.set_title(f"{config.label} zygote")
    process.die_with_parent(config.parent_pid)
    process.set_up_logging(f"{config.label} zygote")
    # Ctrl-C goes to the whole terminal group; it is the agent that decides when a rank ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank.import_all(config)
    if config.transport != "tcp":
        # Where it is not to be had, each rank says what that means.
        with contextlib.suppress(TransportError):
            load_ucxx()
    # A collection in a rank would otherwise touch, and so copy, every object that is imported here.
    gc.freeze()
    with socket.socket(fileno=config.control_fd) as agent:
        _Zygote(agent).run()
    return 0


class _Zygote:
    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._ranks: dict[int, int] = {}
        """pidfd -> pid."""
        self._poll = select.poll()
        self._poll.register(agent.fileno(), select.POLLIN)

    def run(self) -> None:
        """Until the agent's end of the socket is closed."""
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._ranks:
                    self._reap(fd)
                    continue
                data, fds, _, _ = socket.recv_fds(self._agent, MAX_MESSAGE, MAX_FDS)
                if not data:
                    return
                self._fork(RankConfig.from_json(data.decode()).inherit(fds))
                for received in fds:
                    os.close(received)

    def _fork(self, config: RankConfig) -> None:
        config = replace(config, parent_pid=os.getpid())
        pid = os.fork()
        if pid == 0:
            self._become(config)
        pidfd = os.pidfd_open(pid)
        self._ranks[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        socket.send_fds(self._agent, [json.dumps({"pid": pid}).encode()], [pidfd])

    def _become(self, config: RankConfig) -> NoReturn:
        self._agent.close()
        for pidfd in self._ranks:
            os.close(pidfd)
        process.run_and_exit(lambda: rank.run(config), rank.ENDS)

    def _reap(self, pidfd: int) -> None:
        pid = self._ranks.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        told = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
        self._agent.send(json.dumps(told).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv))
