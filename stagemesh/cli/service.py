"""Entry point of a child of `serve`: runs one service with the settings from its parent."""

from __future__ import annotations

from importlib import import_module

from stagemesh.errors import InternalError
from stagemesh.processes.frames import parse
from stagemesh.protos.v1 import processes_pb2

from .main import SERVICES, reported


def run(argument: bytes, fds: list[int]) -> int:
    """Runs the service of a `ServiceStart`, which writes its ports to the one descriptor. Returns the exit status."""
    start = parse(processes_pb2.ServiceStart, argument)
    if start.command not in SERVICES or len(fds) != 1:
        raise InternalError(f"{start.command!r} with {len(fds)} descriptors is no service")
    cls, module, _ = SERVICES[start.command]
    return reported(start.command, lambda: import_module(module).run(cls.model_validate_json(start.settings), fds[0]))
