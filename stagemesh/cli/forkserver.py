"""`python -m stagemesh.cli.forkserver FD PARENT_PID COMMAND FLAGS`: has imported what workers need, and forks them for
`serve`, whose child it is. (The word is that of Python's multiprocessing.)

A worker imports torch and what else its ranks need for seconds of a core, each worker anew, and `serve` starts many on
few cores. Here that is done once. A worker that is forked is made a child of `serve`, which waits for it and ends it
like one that it started itself: nothing depends on this process any more, and without it `serve` starts workers as
usual. COMMAND and FLAGS are those of one worker, and say what to import.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
import time

from stagemesh import process
from stagemesh.errors import StagemeshError
from stagemesh.settings.loading import load
from stagemesh.settings.stage import StageSettings

from .flags import given
from .main import main as command
from .main import parser

MAX_MESSAGE = 1 << 16
ADOPTED_S = 0.0005
"""Between two looks for another parent."""


def main(argv: list[str]) -> int:
    """Forks workers until `serve` is gone."""
    fd, parent_pid = int(argv[1]), int(argv[2])
    process.set_title("forkserver")
    process.die_with_parent(parent_pid)
    process.set_up_logging("forkserver")
    with contextlib.suppress(StagemeshError):
        _import_all(argv[3:])  # A worker that cannot run says so itself.
    # A collection in a worker would otherwise touch, and so copy, every object that is imported here.
    gc.freeze()
    with socket.socket(fileno=fd) as supervisor:
        while True:
            data, fds, _, _ = socket.recv_fds(supervisor, MAX_MESSAGE, 1)
            if not data:
                return 0
            _fork(supervisor, json.loads(data), fds[0], parent_pid)
            os.close(fds[0])


def _import_all(worker: list[str]) -> None:
    from stagemesh.stage_worker.main import preload

    preload(load(StageSettings, file=None, given=given(parser().parse_args(worker), StageSettings)))


def _fork(supervisor: socket.socket, argv: list[str], ready_fd: int, parent_pid: int) -> None:
    """A child whose own parent ends at once comes to the nearest ancestor that adopts orphans, which is `serve`."""
    between = os.fork()
    if between == 0:
        process.run_and_exit(lambda: _between(supervisor, argv, ready_fd, parent_pid), "no worker is forked")
    _, status = os.waitpid(between, 0)
    if status:
        raise ChildProcessError("no worker can be forked: see what was said above")


def _between(supervisor: socket.socket, argv: list[str], ready_fd: int, parent_pid: int) -> int:
    pid = os.getpid()
    if os.fork() == 0:
        while os.getppid() == pid:
            time.sleep(ADOPTED_S)
        process.run_and_exit(lambda: _become(supervisor, argv, ready_fd, parent_pid), "this worker ends")
    return 0


def _become(supervisor: socket.socket, argv: list[str], ready_fd: int, parent_pid: int) -> int:
    process.die_with_parent(parent_pid)
    # As `serve` starts others: Ctrl-C reaches the supervisor alone.
    os.setpgid(0, 0)
    with supervisor:
        supervisor.send(json.dumps({"pid": os.getpid()}).encode())
    return command([*argv, "--ready-fd", str(ready_fd), "--parent-pid", str(parent_pid)])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
