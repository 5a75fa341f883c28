"""`python -m stagemesh.processes.forkserver FD PARENT_PID TITLE`: the program of every child process.

It receives calls on its socket. It runs a RUN call and ends with its status. Or it runs an IMPORT call once, and then
forks a process for each FORK call. (Python's multiprocessing calls this a forkserver.) A forked process becomes a child
of this process's parent, and no longer depends on this process.

A forkserver starts no thread: a fork copies only the thread that forks.
"""

from __future__ import annotations

import gc
import os
import pkgutil
import signal
import socket
import sys
import time

from stagemesh import process
from stagemesh.errors import InternalError
from stagemesh.protos.v1.processes_pb2 import Call, Forked

from .messages import Kind, pack_message, receive_call

ADOPTED_LOOK_S, ADOPTED_S = 0.0005, 10.0
"""Interval and deadline of a forked process that waits for its new parent."""


def main(argv: list[str]) -> int:
    """Runs or forks calls until the parent is gone."""
    with socket.socket(fileno=int(argv[1])) as parent:
        return run(parent, int(argv[2]), argv[3])


def run(parent: socket.socket, parent_pid: int, title: str) -> int:
    """Takes calls from the socket `parent` until it closes, or until a RUN call has ended. Returns the exit status."""
    process.die_with_parent(parent_pid)
    process.set_up_logging(title)
    # Ctrl-C in a terminal reaches the parent as well, and the parent decides when its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (received := receive_call(parent)) is not None:
        kind, call, fds = received
        if kind is Kind.RUN:
            parent.close()
            return _run(call, fds)
        if kind is Kind.FORK:
            _fork(parent, parent_pid, call, fds)
        else:
            process.set_title(title)
            if status := _run(call, fds):
                return status
            # Otherwise a garbage collection in a fork would write to, and so copy, every object imported here.
            gc.freeze()
        for fd in fds:
            os.close(fd)
    return 0


def _run(call: Call, fds: list[int]) -> int:
    try:
        function = pkgutil.resolve_name(call.function)
    except (ImportError, AttributeError, ValueError) as e:
        raise InternalError(f"there is no function {call.function!r} to run: {e}") from e
    status: int = function(call.argument, fds)
    return status


def _fork(parent: socket.socket, parent_pid: int, call: Call, fds: list[int]) -> None:
    """Forks twice. The first process ends at once, so that the launcher's process adopts the second one."""
    between = os.fork()
    if between == 0:
        own = os.getpid()
        process.run_and_exit(lambda: 0 if os.fork() else _become(parent, parent_pid, own, call, fds))
    if os.waitpid(between, 0)[1]:
        raise InternalError("no process can be forked: see what was said above")


def _become(parent: socket.socket, parent_pid: int, between: int, call: Call, fds: list[int]) -> int:
    deadline = time.monotonic() + ADOPTED_S
    while os.getppid() == between:
        if time.monotonic() > deadline:
            raise InternalError(f"process {between} has forked this one, and does not end")
        time.sleep(ADOPTED_LOOK_S)
    process.die_with_parent(parent_pid)
    if call.own_group:
        os.setpgid(0, 0)
    with parent:
        parent.send(pack_message(Kind.FORKED, Forked(pid=os.getpid())))
    return _run(call, fds)


if __name__ == "__main__":
    process.run_and_exit(lambda: main(sys.argv))
