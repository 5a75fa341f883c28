"""What a child of `serve` runs: one service, with the settings that its parent gives it."""

from __future__ import annotations

from importlib import import_module

from stagemesh.errors import InternalError
from stagemesh.processes.frames import parse
from stagemesh.protos.v1 import processes_pb2

from .main import SERVICES, reported


def run(argument: bytes, fds: list[int]) -> int:
    """Runs the service that a `ServiceStart` names, and tells its ports to the one descriptor; the exit status."""
    start = parse(processes_pb2.ServiceStart, argument)
    if start.command not in SERVICES or len(fds) != 1:
        raise InternalError(f"{start.command!r} with {len(fds)} descriptors is no service")
    cls, module, _ = SERVICES[start.command]
    return reported(start.command, lambda: import_module(module).run(cls.model_validate_json(start.settings), fds[0]))
